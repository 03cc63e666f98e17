"""Trans-PEFT in a plain PyTorch loop: python examples/plain_loop.py BASE OUTPUT"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import trans_peft as tp

TEXTS = [f"{n} and {n + 1} make {2 * n + 1}" for n in range(16)]


def main(base: str, output: str, steps: int = 8) -> None:
    torch.manual_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(
        model, LoraConfig(r=8, task_type="CAUSAL_LM", target_modules="all-linear")
    )
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    batches = [
        tokenizer(TEXTS[i : i + 4], padding=True, return_tensors="pt") for i in range(0, 16, 4)
    ]
    model.train()
    with tp.perturbed(model, tp.Perturbation(masking_p=0.1, dropping_p=0.1), seed=42):
        for step in range(steps):
            batch = batches[step % len(batches)]
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            loss = model(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step}: loss {loss.item():.3f}")
    model.save_pretrained(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", metavar="BASE", help="folder of the base model")
    parser.add_argument("output", metavar="OUTPUT", help="folder for the adapter")
    main(**vars(parser.parse_args()))
