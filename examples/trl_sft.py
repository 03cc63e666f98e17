"""Trans-PEFT in TRL's SFT trainer: python examples/trl_sft.py BASE OUTPUT"""

import argparse

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

import trans_peft as tp

ROWS = [{"prompt": f"{n} and {n + 1} make ", "completion": f"{2 * n + 1}"} for n in range(16)]


def main(base: str, output: str, steps: int = 4) -> None:
    set_seed(42)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(
        model, LoraConfig(r=8, task_type="CAUSAL_LM", target_modules="all-linear")
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output, max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3,
            bf16=False, save_strategy="no", report_to=[],
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(base),
    )  # fmt: skip
    with tp.perturbed(model.train(), tp.Perturbation(masking_p=0.1, dropping_p=0.1), seed=42):
        trainer.train()
    trainer.save_model(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", metavar="BASE", help="folder of the base model")
    parser.add_argument("output", metavar="OUTPUT", help="folder for the adapter")
    main(**vars(parser.parse_args()))
