"""Trans-PEFT in an accelerate loop: accelerate launch examples/accelerate_loop.py BASE OUTPUT"""

import argparse

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import trans_peft as tp

TEXTS = [f"{n} and {n + 1} make {2 * n + 1}" for n in range(32)]


def main(base: str, output: str) -> None:
    accelerator = Accelerator(gradient_accumulation_steps=2)
    torch.manual_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(
        model, LoraConfig(r=8, task_type="CAUSAL_LM", target_modules="all-linear")
    )
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    loader = DataLoader(
        TEXTS, 4, collate_fn=lambda t: tokenizer(t, padding=True, return_tensors="pt")
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    with tp.perturbed(model, tp.Perturbation(masking_p=0.1, dropping_p=0.1), seed=42):
        for batch in loader:
            with accelerator.accumulate(model):
                labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
                loss = model(**batch, labels=labels).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            accelerator.print(f"loss {loss.item():.3f}")
    accelerator.unwrap_model(model).save_pretrained(
        output, is_main_process=accelerator.is_main_process
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", metavar="BASE", help="folder of the base model")
    parser.add_argument("output", metavar="OUTPUT", help="folder for the adapter")
    main(**vars(parser.parse_args()))
