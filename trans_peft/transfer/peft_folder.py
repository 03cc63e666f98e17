"""What lies in a PEFT folder, read without torch: its config, each tensor's name and shape.

The format is what `PeftModel.save_pretrained` writes (PEFT 0.21): `adapter_config.json` beside
`adapter_model.safetensors`, keys prefixed with `base_model.model.`, the adapter's own name taken
out. Pickled weights are never opened.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trans_peft.domain.bounds import MAX_ADAPTER_CONFIG_BYTES, MAX_TENSORS
from trans_peft.errors import AdapterError

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "PeftFolder", "read_peft_folder"]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_REWRITING_INITS = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftFolder:
    """A PEFT folder that can be read: `tensors` maps each key of the weights file to its shape."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]

    @property
    def peft_type(self) -> str:
        """The method, in PEFT's spelling ("LORA")."""
        return str(self.config["peft_type"])

    @property
    def rewriting_init(self) -> str | None:
        """The initialisation that subtracts the start of the adapter from the base, if it used one.

        PiSSA and its kin train against a base that they changed first; PEFT repeats that change on
        whatever base the adapter is loaded on, so the same bytes mean something else on each base.
        """
        init = str(self.config.get("init_lora_weights", "")).lower()
        return init if init.startswith(_REWRITING_INITS) else None


def read_peft_folder(folder: Path) -> PeftFolder:
    """Read the config and the tensors' names of a PEFT folder. AdapterError with all problems."""
    problems: list[str] = []
    config = _config(folder, problems)
    tensors = _tensors(folder, problems)
    if problems:
        raise AdapterError(
            f"{folder} is not a PEFT adapter that can be used: {'; '.join(problems)}",
            expected=f"{CONFIG_NAME} and {WEIGHTS_NAME}",
            found=", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing there",
            do="save the adapter again with PeftModel.save_pretrained(folder)",
        )
    return PeftFolder(folder, config, tensors)


def _config(folder: Path, problems: list[str]) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        problems.append(f"it has no {CONFIG_NAME}")
        return {}
    if path.stat().st_size > MAX_ADAPTER_CONFIG_BYTES:
        problems.append(f"{CONFIG_NAME} has more than {MAX_ADAPTER_CONFIG_BYTES} bytes")
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        problems.append(f"{CONFIG_NAME} is not JSON ({error})")
        return {}
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        problems.append(f"{CONFIG_NAME} names no peft_type")
        return {}
    return config


def _tensors(folder: Path, problems: list[str]) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickled = sorted(
            file.name
            for file in folder.glob("adapter_model.*")
            if file.suffix in (".bin", ".pt", ".pth")
        )
        problems.append(
            f"its weights are pickled ({', '.join(pickled)}), which can run code when opened"
            if pickled
            else f"it has no {WEIGHTS_NAME}"
        )
        return {}
    try:
        with safe_open(path, framework="numpy") as file:
            if (count := len(file.keys())) > MAX_TENSORS:
                problems.append(f"{WEIGHTS_NAME} holds {count} tensors, more than {MAX_TENSORS}")
                return {}
            tensors = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        problems.append(f"{WEIGHTS_NAME} cannot be read ({error})")
        return {}
    if not tensors:
        problems.append(f"{WEIGHTS_NAME} holds no tensor")
    return tensors
