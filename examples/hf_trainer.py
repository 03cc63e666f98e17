"""Trans-PEFT in the Hugging Face Trainer: python examples/hf_trainer.py BASE OUTPUT"""

import argparse

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

import trans_peft as tp

TEXTS = [f"{n} and {n + 1} make {2 * n + 1}" for n in range(16)]


def main(base: str, output: str, steps: int = 4) -> None:
    set_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(
        model, LoraConfig(r=8, task_type="CAUSAL_LM", target_modules="all-linear")
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output, max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            learning_rate=1e-3, gradient_checkpointing=True, save_strategy="no", report_to=[],
        ),
        train_dataset=Dataset.from_dict({"text": TEXTS}).map(
            lambda row: tokenizer(row["text"]), remove_columns="text"
        ),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )  # fmt: skip
    with tp.perturbed(model.train(), tp.Perturbation(masking_p=0.1, dropping_p=0.1), seed=42):
        trainer.train()
    trainer.save_model(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", metavar="BASE", help="folder of the base model")
    parser.add_argument("output", metavar="OUTPUT", help="folder for the adapter")
    main(**vars(parser.parse_args()))
