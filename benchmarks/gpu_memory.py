"""Estimates the memory of a training on a 7B base, without weights and without a GPU.

    python -m benchmarks.gpu_memory [--recipe examples/qwen2_7b.yaml]

The base has Qwen2-7B's shape (its published config.json). The recipe is estimated as it is, and
with single fields changed (docs/gpu.md).
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from transformers import Qwen2Config

from trans_peft.cli.files import read_recipe
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.training.job_rows import JobRows
from trans_peft.training.memory import estimate_memory

RECIPE = Path(__file__).parents[1] / "examples" / "qwen2_7b.yaml"
QWEN2_7B = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    max_position_embeddings=131072,
    architectures=["Qwen2ForCausalLM"],
)


def changes(recipe: TrainingRecipe) -> Iterator[tuple[str, TrainingRecipe]]:
    """Yield the recipe, and it with single fields changed."""
    yield "the recipe", recipe
    yield "dtype: nf4", replace(recipe, dtype="nf4")
    half = replace(recipe.optimizer, batch_size=recipe.optimizer.batch_size // 2)
    yield f"optimizer.batch_size: {half.batch_size}", replace(recipe, optimizer=half)
    without = replace(recipe.compute, gradient_checkpointing=False)
    yield "compute.gradient_checkpointing: false", replace(recipe, compute=without)


def main() -> None:
    ours = argparse.ArgumentParser(description=__doc__)
    ours.add_argument("--recipe", type=Path, default=RECIPE)
    recipe = read_recipe(ours.parse_args().recipe)
    with tempfile.TemporaryDirectory() as base:
        QWEN2_7B.save_pretrained(base)
        for name, changed in changes(recipe):
            step = JobRows([], (), 0, []).largest_step(changed)
            print(f"{name}: {estimate_memory(changed, Path(base), step)}", flush=True)


if __name__ == "__main__":
    main()
