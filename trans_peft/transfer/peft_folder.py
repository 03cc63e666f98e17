"""Read the config and the names and shapes of the tensors in a PEFT folder, without torch.

`PeftModel.save_pretrained` (PEFT 0.21) writes `adapter_config.json` and
`adapter_model.safetensors`. Its keys start with `base_model.model.` and do not contain the name of
the adapter. Pickled weights are never opened.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trans_peft.domain.adapter_config import parse_adapter_config
from trans_peft.domain.bounds import MAX_ADAPTER_CONFIG_BYTES
from trans_peft.errors import AdapterError, listed
from trans_peft.safetensors_header import MalformedSafetensorsError, read_file_header

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "PeftFolder", "read_peft_folder"]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})  # as safetensors spells them
_INTEGERS = frozenset({"I64", "I32", "I16", "I8", "U8", "BOOL"})
_WHOLE_NUMBERS = ("indices", "frod_s_size")
"""Parts of the names of integer tensors, which SHiRA, VB-LoRA and FROD save."""
_SHA256 = re.compile("[0-9a-f]{64}")
_REWRITING_INITS = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftFolder:
    """The content of a valid PEFT folder.

    Attributes:
        path: the folder.
        config: the fields of adapter_config.json.
        tensors: shape of each tensor, by its key in the weights file.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]

    @property
    def peft_type(self) -> str:
        """The method, in PEFT's spelling ("LORA")."""
        return str(self.config["peft_type"])

    @property
    def base_fingerprint_sha256(self) -> str | None:
        """The fingerprint of the base that the adapter is bound to; None if none is recorded.

        Training, adoption and transfer record it as `revision`. A revision of a model hub is
        shorter.
        """
        revision = str(self.config.get("revision"))
        return revision if _SHA256.fullmatch(revision) else None

    @property
    def rewriting_init(self) -> str | None:
        """The initialization that modifies the base's weights, such as "pissa"; None for others.

        PiSSA and similar methods subtract the initial adapter from the base before training. PEFT
        repeats this on any base that the adapter is loaded on, so that the adapter computes
        something else on each base.
        """
        init = str(self.config.get("init_lora_weights", "")).lower()
        return init if init.startswith(_REWRITING_INITS) else None


def read_peft_folder(folder: Path) -> PeftFolder:
    """Read a PEFT folder. Raises AdapterError with all problems."""
    problems: list[str] = []
    config = _config(folder, problems)
    tensors = _tensors(folder, problems)
    if problems:
        raise AdapterError(
            f"{folder} is not a valid PEFT adapter: {'; '.join(problems)}",
            expected=f"{CONFIG_NAME} and {WEIGHTS_NAME}",
            found=", ".join(sorted(path.name for path in folder.glob("*"))) or "no files",
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
        return parse_adapter_config(path.read_bytes())
    except (ValueError, OSError) as error:
        problems.append(f"{CONFIG_NAME} cannot be used: {error}")
        return {}


def _tensors(folder: Path, problems: list[str]) -> dict[str, tuple[int, ...]]:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickled = sorted(
            file.name
            for file in folder.glob("adapter_model.*")
            if file.suffix in (".bin", ".pt", ".pth")
        )
        problems.append(
            f"its weights are pickled ({', '.join(pickled)}), and pickles can run code"
            if pickled
            else f"it has no {WEIGHTS_NAME}"
        )
        return {}
    try:
        entries = read_file_header(path).entries
    except (MalformedSafetensorsError, OSError) as error:
        problems.append(f"{WEIGHTS_NAME} cannot be read ({error})")
        return {}
    tensors = {entry.name: entry.shape for entry in entries}
    types = {entry.name: entry.dtype for entry in entries}
    if not tensors:
        problems.append(f"{WEIGHTS_NAME} holds no tensor")
    invalid = [
        f"{key} ({kind})"
        for key, kind in types.items()
        if kind
        not in (_FLOATS | _INTEGERS if any(name in key for name in _WHOLE_NUMBERS) else _FLOATS)
    ]
    if invalid:
        problems.append(
            f"{WEIGHTS_NAME} holds tensors of an unsupported dtype: {listed(invalid)};"
            f" expected {', '.join(sorted(_FLOATS))}, or integers for indices"
        )
    return tensors
