"""A base, its update and compensated adapters, for tests of what a server makes of them."""

from pathlib import Path

import torch

from tests.tiny import tiny_model, tiny_tokenizer
from trans_peft.bases.drift import weight_pairs
from trans_peft.transfer.compensation import compensate
from trans_peft.transfer.module_inputs import module_inputs

SEQUENCES = [list(range(start, start + 12)) for start in range(0, 240, 5)]
UPDATED = ("mlp", "embed_tokens", "lm_head")
"""Modules that the update changes."""


def base_and_update(folder: Path, *, tied: bool = True, **shape: int) -> tuple[Path, Path]:
    """Write a tiny base and an update of its FFNs and embeddings, and return the folders."""
    old = tiny_model(**shape)
    if not tied:
        config = old.config
        config.tie_word_embeddings = False
        old = type(old)(config)
    torch.manual_seed(7)
    paths = folder / "old", folder / "new"
    for path in paths:
        old.save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
        with torch.no_grad():
            for name, weight in old.named_parameters():
                if any(module in name for module in UPDATED):
                    weight += 0.5 * weight.std() * torch.randn_like(weight)
    return paths


def compensated(
    adapter: Path, bases: tuple[Path, Path], target: Path, *, output_layer: bool = True
) -> Path:
    """Write the adapter compensated for the update, with a rank that is larger by 4."""
    old, new = bases
    inputs = module_inputs(type(tiny_model()).from_pretrained(old), adapter, SEQUENCES)
    chosen = {
        name: found for name, found in inputs.items() if output_layer or not found.of_output_layer
    }
    return compensate(adapter, weight_pairs(old, new), chosen, 4, target).folder
