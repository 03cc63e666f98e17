"""Load a base model and its tokenizer, and hash the files of an adapter.

Weights are read from local safetensors files only, and code that comes with a base is never run. A
process keeps one base in memory, so that several adapters can be evaluated on it in turn.
"""

import gc
import hashlib
import json
import logging
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trans_peft.checksums import ModelChecksums, model_checksums, tokenizer_checksums
from trans_peft.domain.adapter_config import parse_adapter_config
from trans_peft.domain.identity import content_sha256
from trans_peft.errors import (
    AdapterError,
    InvalidSpecError,
    NotFoundError,
    UnsupportedModelError,
    WorkerError,
    listed,
)
from trans_peft.loading import is_text_backbone, loading_problems, unexpected_names
from trans_peft.safetensors_header import MalformedSafetensorsError, read_file_header
from trans_peft.text.saved_template import TEMPLATE_NAME, saved_template
from trans_peft.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "LoadedBase",
    "adapter_weights_sha256",
    "base_files",
    "borrow_memory",
    "check_gpus",
    "end_token_problems",
    "load_base",
    "load_tokenizer",
    "release_base",
    "remove_unrecorded_template",
]

_log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_PROVENANCE_FIELDS = {
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "auto_mapping",
}
"""Fields of adapter_config.json that do not affect logits."""


@dataclass(frozen=True)
class LoadedBase:
    """A base in evaluation mode on its device, and its tokenizer."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"


@dataclass(frozen=True)
class _CachedBase:
    key: tuple[Any, ...]
    checksums: ModelChecksums
    base: LoadedBase


_cached: _CachedBase | None = None
_return_memory: Callable[[], None] | None = None


def release_base() -> None:
    """Free the memory of the base that `load_base` keeps, before another process needs it."""
    import torch

    global _cached
    _cached = None
    gc.collect()  # models refer to themselves
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_gpus(wanted: int) -> None:
    """Raise WorkerError if PyTorch sees fewer GPUs. `load_base` would use the CPU without one."""
    import torch

    if (found := torch.cuda.device_count()) < wanted:
        raise WorkerError(
            "this worker lacks GPUs",
            expected=f"at least {wanted} that PyTorch sees (TRANS_PEFT_GPUS of this worker)",
            found=found,
            do="stop this worker, and correct its driver, its build of torch or its "
            "CUDA_VISIBLE_DEVICES, or lower TRANS_PEFT_GPUS",
        )


def borrow_memory(release: Callable[[], None]) -> None:
    """Free the memory of the base that `load_base` keeps, until a base is loaded again.

    `release` is called before that. It frees what the caller has on the device.
    """
    global _return_memory
    release_base()
    _return_memory = release


def load_base(
    folder: Path, dtype: str, device: str | None = None, *, attention: str = "auto"
) -> LoadedBase:
    """Load a base from a Hugging Face folder, or return the base that was loaded last.

    A process keeps one base in memory. It is returned again for the same folder, files, dtype and
    device, unless its content has changed since it was loaded (`trans_peft.checksums`). A changed
    base is loaded again. Loading another base releases the one in memory first.

    Without `device`, a base that does not fit the first GPU is placed on all visible GPUs, and in
    the host's memory (`trans_peft.placement`).

    Args:
        folder: a folder with config.json, safetensors files and a tokenizer.
        dtype: name of a torch dtype ("float32"), or "nf4" for linear layers in 4 bits to train on
            (QLoRA, Dettmers et al. 2023: NF4 with double quantization, computing in bfloat16).
        device: name of a torch device; by default the GPUs if there are any, else "cpu".
        attention: transformers' name of an attention implementation; "auto" leaves the choice to
            transformers.

    Raises:
        NotFoundError: the folder lacks a part of a base.
        UnsupportedModelError: transformers has no causal language model for the files, a tensor is
            missing or unexpected, or there is no valid end-of-text token.
        InvalidSpecError: dtype is "nf4", and bitsandbytes is not installed.
        OutOfMemoryError: the first GPU cannot hold a layer of the base.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from trans_peft.placement import gpus, place

    global _cached, _return_memory
    folder = Path(folder).resolve()
    if dtype == "nf4":  # loaded on one device
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    key = (folder, dtype, device, attention, base_files(folder))
    if _cached is not None:
        if _cached.key == key:
            changed = _cached.checksums.changes(_checksums(_cached.base))
            if not changed:
                _cached.base.model.eval()
                return _cached.base
            _log.warning("%s changed in memory and is loaded again: %s", folder, listed(changed))
        _cached = None
    if _return_memory is not None:
        _return_memory()
        _return_memory = None
    options = _quantization_options(device) if dtype == "nf4" else {"dtype": getattr(torch, dtype)}
    if attention != "auto":
        options["attn_implementation"] = attention
    try:
        tokenizer = load_tokenizer(folder)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            **options,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # report all of them; the default raises for the first
        )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"transformers cannot load {folder} as a causal language model",
            found=f"{type(error).__name__}: {error}",
            do="correct its files, or convert it to an architecture of transformers; code in a "
            "base is never run",
        ) from error
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        raise _mismatch_error(folder, [f"the tensors do not convert: {error}"]) from error
    if problems := _differences(folder, model, report):
        raise _mismatch_error(folder, problems)
    if problems := end_token_problems(model):
        raise UnsupportedModelError(
            f"no answer of the base in {folder} would end",
            found="; ".join(problems),
            do="correct the file, and publish the base as a new version",
        )
    model.config.return_dict = True  # config.json may disable it; this library needs named outputs
    if device is None:
        place(model, gpus())
    else:
        model.to(device)
    model.eval()
    _keep_quantized_weights(model)
    base = LoadedBase(model, tokenizer)
    _cached = _CachedBase(key, _checksums(base), base)
    return base


def _differences(folder: Path, model: "PreTrainedModel", report: dict[str, Any]) -> list[str]:
    """Return all differences between the tensors of the files and those of the model."""
    from transformers import AutoConfig

    unexpected = unexpected_names(model, report["unexpected_keys"])
    if unexpected:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if is_text_backbone(type(model), config):
            unexpected = []
    return loading_problems(report["missing_keys"], unexpected, report["mismatched_keys"])


def end_token_problems(model: "PreTrainedModel") -> list[str]:
    """Return the `eos_token_id` fields that are no token ids, so that no answer would end."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    problems = []
    for owner, name in (("config", "config.json"), ("generation_config", "generation_config.json")):
        found = getattr(getattr(model, owner, None), "eos_token_id", None)
        ids = found if isinstance(found, list) else [found]
        if not all(i is None or (type(i) is int and 0 <= i < vocabulary) for i in ids):
            problems.append(
                f"eos_token_id in {name} must be a token id from 0 to {vocabulary - 1}, or a list "
                f"of them, and is {reprlib.repr(found)}"
            )
    return problems


def _mismatch_error(folder: Path, problems: list[str]) -> UnsupportedModelError:
    return UnsupportedModelError(
        "\n  - ".join([f"the weights in {folder} do not match config.json:", *problems]),
        do="save the model again with save_pretrained(folder), or correct config.json",
    )


def _keep_quantized_weights(model: "PreTrainedModel") -> None:
    """Let bitsandbytes compute with 4-bit weights as they are.

    On processors with AVX512-BF16 it packs them again at the first forward pass in eval mode. That
    rounds their scales, and fails for modules with fewer than 64 input features.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _quantization_options(device: str | None) -> dict[str, Any]:
    """Return the options of `from_pretrained` that load a base in 4 bits directly on a device."""
    import torch
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise InvalidSpecError(
            "dtype nf4 needs bitsandbytes, which is not installed",
            do="pip install '.[quantized]' in a checkout of trans-peft, or train in bfloat16",
        )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "dtype": torch.bfloat16, "device_map": {"": device}}


def adapter_weights_sha256(folder: Path, *, template: bool = True) -> str:
    """Return the SHA-256 of everything in an adapter's folder that affects its outputs.

    The hash covers:

    - the names, dtypes, shapes and bytes of all tensors, sorted by name;
    - adapter_config.json (the same tensors with another `lora_alpha` are another adapter), without
      the fields that state where the adapter comes from;
    - the pinned chat template, if the folder has one and `template` is True.

    The metadata of the weights file and the order of its tensors have no effect, so a file that is
    saved again has the same hash. The weights are read without torch.

    Raises:
        NotFoundError: adapter_model.safetensors or adapter_config.json is missing.
        AdapterError: a file cannot be read.
    """
    path = Path(folder) / "adapter_model.safetensors"
    config = Path(folder) / "adapter_config.json"
    missing = [file.name for file in (path, config) if not file.is_file()]
    if missing:
        raise NotFoundError(
            f"{folder} is not the folder of an adapter",
            expected=", ".join(missing),
            do="save it with model.save_pretrained(folder); pickle weights are never loaded",
        )
    sha256 = hashlib.sha256(content_sha256(_hashed_config(config)).encode())
    try:
        header = read_file_header(path)
    except MalformedSafetensorsError as error:
        raise AdapterError(
            f"{path} is not a safetensors file",
            found=error,
            do="write the folder again with model.save_pretrained(folder)",
        ) from error
    with path.open("rb") as file:
        for tensor in sorted(header.entries, key=lambda tensor: tensor.name):
            sha256.update(json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode())
            file.seek(header.data_offset + tensor.start)
            for start in range(tensor.start, tensor.end, _CHUNK_BYTES):
                sha256.update(file.read(min(_CHUNK_BYTES, tensor.end - start)))
    template_path = Path(folder) / TEMPLATE_NAME
    if template and template_path.is_file():
        sha256.update(content_sha256([TEMPLATE_NAME, saved_template(Path(folder))]).encode())
    return sha256.hexdigest()


def remove_unrecorded_template(folder: Path, weights_sha256: str) -> bool:
    """Delete a downloaded chat template that the recorded hash of an adapter does not cover.

    Such an adapter was evaluated with the template of its base. `folder` is a local copy of the
    adapter, and `weights_sha256` is the recorded hash. Returns whether the template was deleted:
    only if the folder has one, and its hash without the template is the recorded hash.
    """
    path = Path(folder) / TEMPLATE_NAME
    if not path.is_file() or adapter_weights_sha256(folder, template=False) != weights_sha256:
        return False
    path.unlink()
    return True


def _hashed_config(config: Path) -> dict[str, Any]:
    """Return the fields of an adapter_config.json that are part of the hash."""
    try:
        fields = parse_adapter_config(config.read_bytes())
    except ValueError as error:
        raise AdapterError(
            f"{config} is not the configuration of an adapter",
            found=error,
            do="write the folder again with model.save_pretrained(folder)",
        ) from error
    return {
        name: sorted(value) if name == "target_modules" and isinstance(value, list) else value
        for name, value in fields.items()
        if name not in _PROVENANCE_FIELDS
    }


def base_files(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Return (name, size in bytes, mtime in ns) of the files of a base, or raise NotFoundError."""
    files = {path.name: path for path in folder.glob("*") if path.is_file()}
    missing = []
    if "config.json" not in files:
        missing.append("config.json")
    if not any(name.endswith(".safetensors") for name in files):
        missing.append("weights as .safetensors (pickle weights are never loaded)")
    if not {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"} & files.keys():
        missing.append("a tokenizer (tokenizer.json)")
    if missing:
        raise NotFoundError(
            f"{folder} is not the folder of a base model",
            expected="; ".join(missing),
            found=", ".join(sorted(files)) or "no files",
            do="save model and tokenizer there with save_pretrained(folder)",
        )
    stats = ((name, path.stat()) for name, path in sorted(files.items()))
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _checksums(base: LoadedBase) -> ModelChecksums:
    parts = model_checksums(base.model).parts
    return ModelChecksums({**parts, **tokenizer_checksums(base.tokenizer).parts})
