"""Multiply the scale of a LoRA adapter by a factor.

LoRA adds (lora_alpha / r) * B A to a weight (eq. 1 of the paper; rsLoRA divides by sqrt(r)). The
factor is applied to `lora_alpha` and `alpha_pattern` in the config. The tensors stay the same, but
the adapter's hash changes, because it covers the config.
"""

import json
import reprlib
import shutil
from pathlib import Path

from trans_peft.domain.numbers import is_finite_number
from trans_peft.errors import AdapterError, InvalidSpecError, listed
from trans_peft.transfer.peft_folder import CONFIG_NAME, read_peft_folder

__all__ = ["has_scale", "rescaled"]


def has_scale(folder: Path) -> bool:
    """Whether an adapter has a scale that can be changed (LoRA, with or without DoRA)."""
    return read_peft_folder(folder).peft_type == "LORA"


def rescaled(folder: Path, target: Path, factor: float) -> Path:
    """Write a copy of the adapter with its scale multiplied by `factor`, and return `target`.

    Raises:
        AdapterError: the method has no scale, or the scale in the config is not a number.
        InvalidSpecError: the factor is not positive and finite.
    """
    source = read_peft_folder(folder)
    if not has_scale(folder):
        raise AdapterError(f"{folder}: a {source.peft_type} adapter has no scale", expected="LORA")
    if not 0 < factor < float("inf"):
        raise InvalidSpecError("the factor of a scale must be positive and finite", found=factor)
    config = dict(source.config)
    pattern = config.get("alpha_pattern") or {}
    alphas = [("lora_alpha", config.get("lora_alpha")), *pattern.items()]
    wrong = [
        f"{key}: {reprlib.repr(alpha)}" for key, alpha in alphas if not is_finite_number(alpha)
    ]
    if wrong:
        raise AdapterError(f"{folder}: every scale must be a number", found=listed(wrong))
    config["lora_alpha"] = config["lora_alpha"] * factor
    config["alpha_pattern"] = {name: alpha * factor for name, alpha in pattern.items()}
    shutil.copytree(folder, target)
    (target / CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return target
