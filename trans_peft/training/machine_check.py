"""Refuse, before a model is loaded, settings that this machine or its packages cannot run."""

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from transformers.utils import is_flash_attn_2_available

from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.errors import InvalidSpecError

__all__ = ["check_machine"]


def check_machine(recipe: TrainingRecipe) -> None:
    """Raise InvalidSpecError with every setting of the recipe that cannot run here."""
    problems = list(_problems(recipe, has_gpu=torch.cuda.is_available()))
    if problems:
        raise InvalidSpecError(
            "this machine cannot run the recipe\n    " + "\n    ".join(problems),
            do="change these fields, or train on a worker that has what they need",
        )


def _problems(recipe: TrainingRecipe, *, has_gpu: bool) -> Iterator[str]:
    compute = recipe.compute
    gpu = [] if has_gpu else ["a GPU"]
    needs: dict[str, list[str]] = {}
    if "8bit" in recipe.optimizer.name or "paged" in recipe.optimizer.name:
        needs[f"optimizer.name {recipe.optimizer.name}"] = [*_package("bitsandbytes"), *gpu]
    if compute.attention == "flash_attention_2" and not is_flash_attn_2_available():
        needs["compute.attention flash_attention_2"] = [*_package("flash_attn"), *gpu]
    if compute.attention == "flex_attention":  # PyTorch has no backward pass of it on CPUs
        needs["compute.attention flex_attention"] = gpu
    if compute.liger:
        needs["compute.liger"] = [*_package("liger_kernel"), *gpu]
    if compute.compile:
        needs["compute.compile"] = _package("triton") if has_gpu else _compiler()
    for name, missing in needs.items():
        if missing:
            yield f"{name} needs {' and '.join(missing)}"


def _package(module: str) -> list[str]:
    return [] if find_spec(module) else [f"the package {module.replace('_', '-')}"]


def _compiler() -> list[str]:
    found = shutil.which(os.environ.get("CXX", "g++"))
    return [] if found else ["a C++ compiler (g++, or the one that CXX names)"]
