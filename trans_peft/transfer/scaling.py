"""The same adapter, louder or softer: its own scale times a factor, in a stock PEFT folder.

LoRA adds (lora_alpha / r) * B A to a weight (eq. 1 of the paper; over sqrt(r) with rsLoRA), so
`lora_alpha` times a factor is the whole change, with `alpha_pattern` where single modules have an
alpha of their own. No tensor changes, but the hash of the weights does: alpha belongs to it.
"""

import json
import shutil
from pathlib import Path

from trans_peft.errors import AdapterError, InvalidSpecError, listed
from trans_peft.transfer.peft_folder import CONFIG_NAME, read_peft_folder

__all__ = ["has_scale", "rescaled"]


def has_scale(folder: Path) -> bool:
    """Whether an adapter has a scale that can be turned (LoRA, with or without DoRA)."""
    return read_peft_folder(folder).peft_type == "LORA"


def rescaled(folder: Path, target: Path, factor: float) -> Path:
    """Write the adapter in `folder` with its scale times `factor` to `target`, and return that.

    AdapterError for a method without a scale, InvalidSpecError for a factor that is not positive.
    """
    source = read_peft_folder(folder)
    if not has_scale(folder):
        raise AdapterError(f"{folder}: a {source.peft_type} adapter has no scale", expected="LORA")
    if not 0 < factor < float("inf"):
        raise InvalidSpecError("a scale's factor is positive and finite", found=factor)
    config = dict(source.config)
    pattern = config.get("alpha_pattern") or {}
    alphas = {"lora_alpha": config.get("lora_alpha"), **pattern}
    wrong = [f"{key}: {alpha!r}" for key, alpha in alphas.items() if not _is_number(alpha)]
    if wrong:
        raise AdapterError(f"{folder}: a scale must be a number", found=listed(wrong))
    config["lora_alpha"] = config["lora_alpha"] * factor
    config["alpha_pattern"] = {name: alpha * factor for name, alpha in pattern.items()}
    shutil.copytree(folder, target)
    (target / CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return target


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
