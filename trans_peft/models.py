"""Load a base model and its tokenizer; know an adapter's weights by their hash.

A thin layer over transformers that fixes what must not vary: local safetensors only, never code
that came with the files, one base per process however many adapters are put on it.
"""

import hashlib
import json
import logging
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
    "keeps_no_template",
    "load_base",
    "load_tokenizer",
]

_log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_ORIGIN = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"}
"""Fields of adapter_config.json that no logit depends on."""


@dataclass(frozen=True)
class LoadedBase:
    """A base in evaluation mode on its device, and its tokenizer."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"


@dataclass(frozen=True)
class _Held:
    key: tuple[Any, ...]
    state: ModelChecksums
    base: LoadedBase


_held: _Held | None = None


def load_base(folder: Path, dtype: str, device: str | None = None) -> LoadedBase:
    """Load a Hugging Face folder (config, safetensors, tokenizer), or hand out the one loaded last.

    `dtype` is torch's name ("float32"), or "nf4" for linear layers in 4 bits to train on (QLoRA,
    Dettmers et al. 2023: NF4, quantised twice, computing in bfloat16); `device` any of torch's, by
    default cuda where there is one, else cpu. A process holds one base at a time: asking for
    another lets go of the first before it loads. Before a held base is handed out again, its
    content is compared with what was loaded (`trans_peft.checksums`); after any change it is
    dropped and loaded again. Raises NotFoundError for a folder that is not a base,
    UnsupportedModelError where no causal language model or no end-of-text token is found, or where
    the files lack a tensor of the model or hold one that it does not have; InvalidSpecError where
    a package that nf4 needs is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM

    global _held
    folder = Path(folder).resolve()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    key = (folder, dtype, device, _files(folder))
    if _held is not None:
        if _held.key == key and not (changed := _held.state.changes(_state(_held.base))):
            _held.base.model.eval()
            return _held.base
        if _held.key == key:
            _log.warning("%s changed in memory and is loaded again: %s", folder, listed(changed))
        _held = None
    precision = _four_bits(device) if dtype == "nf4" else {"dtype": getattr(torch, dtype)}
    try:
        tokenizer = load_tokenizer(folder)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            **precision,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report has all of them; the default stops at one
        )
    except (ValueError, KeyError) as error:  # transformers' words for a layout it has no class for
        raise UnsupportedModelError(
            f"transformers has no causal language model for {folder}",
            found=error,
            do="convert it to a layout that transformers knows; its own code is never run",
        ) from error
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        raise _unfilled(folder, [f"the files' tensors do not convert: {error}"]) from error
    if problems := _differences(folder, model, report):
        raise _unfilled(folder, problems)
    _check_end_tokens(folder, model)
    model.config.return_dict = True  # a config.json may switch it off; outputs are read by name
    model.to(device).eval()
    base = LoadedBase(model, tokenizer)
    _held = _Held(key, _state(base), base)
    return base


def _differences(folder: Path, model: "PreTrainedModel", report: dict[str, Any]) -> list[str]:
    """Return every way in which the files' tensors are not those of the model."""
    from transformers import AutoConfig

    unexpected = unexpected_names(model, report["unexpected_keys"])
    if unexpected:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if is_text_backbone(type(model), config):
            unexpected = []
    return loading_problems(report["missing_keys"], unexpected, report["mismatched_keys"])


def _check_end_tokens(folder: Path, model: "PreTrainedModel") -> None:
    """Refuse end tokens that are no token ids: no answer would ever end with them."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for owner, name in (("config", "config.json"), ("generation_config", "generation_config.json")):
        found = getattr(getattr(model, owner, None), "eos_token_id", None)
        ids = found if isinstance(found, list) else [found]
        if not all(i is None or (type(i) is int and 0 <= i < vocabulary) for i in ids):
            raise UnsupportedModelError(
                f"eos_token_id in {folder / name} cannot be used",
                expected=f"a token id from 0 to {vocabulary - 1}, or a list of them",
                found=repr(found),
            )


def _unfilled(folder: Path, problems: list[str]) -> UnsupportedModelError:
    return UnsupportedModelError(
        "\n  - ".join([f"the files in {folder} do not hold the model of config.json:", *problems]),
        do="save the model again with save_pretrained(folder), or correct config.json",
    )


def _four_bits(device: str) -> dict[str, Any]:
    """Return what makes transformers load a base in 4 bits, each weight straight to its device."""
    import torch
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise InvalidSpecError(
            "dtype nf4 needs bitsandbytes, which is not installed",
            do="pip install 'trans-peft[quantized]', or train in bfloat16",
        )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "dtype": torch.bfloat16, "device_map": {"": device}}


def adapter_weights_sha256(folder: Path, *, template: bool = True) -> str:
    """Return the sha256 of all that an adapter computes with: tensors, configuration, template.

    Of the tensors: names (sorted), dtypes, shapes, bytes. Of the configuration: every field (the
    same tensors with another `lora_alpha` are another adapter) but those that say where it came
    from. The file's metadata and the order of its tensors do not count, so the same adapter has the
    same hash whoever saved it. Of the chat template, where the folder holds one: its bytes, since
    prompts depend on it (`template=False` leaves it out, as versions of this library did that kept
    none). Reads `adapter_model.safetensors` without torch (format:
    huggingface/safetensors, README). Raises AdapterError, NotFoundError.
    """
    path = Path(folder) / "adapter_model.safetensors"
    config = Path(folder) / "adapter_config.json"
    missing = [file.name for file in (path, config) if not file.is_file()]
    if missing:
        raise NotFoundError(
            f"{folder} is not an adapter's folder",
            expected=", ".join(missing),
            do="save it with model.save_pretrained(folder); pickle weights are never loaded",
        )
    sha256 = hashlib.sha256(content_sha256(_computed_with(config)).encode())
    try:
        header = read_file_header(path)
    except MalformedSafetensorsError as error:
        raise AdapterError(f"{path} is not a safetensors file", found=error) from error
    with path.open("rb") as file:
        for tensor in sorted(header.entries, key=lambda tensor: tensor.name):
            sha256.update(json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode())
            file.seek(header.data_offset + tensor.start)
            for start in range(tensor.start, tensor.end, _CHUNK_BYTES):
                sha256.update(file.read(min(_CHUNK_BYTES, tensor.end - start)))
    beside = Path(folder) / TEMPLATE_NAME
    if template and beside.is_file():
        sha256.update(content_sha256([TEMPLATE_NAME, saved_template(Path(folder))]).encode())
    return sha256.hexdigest()


def keeps_no_template(folder: Path, weights_sha256: str) -> bool:
    """Whether a registered adapter has this hash without the chat template in its folder.

    Versions that were registered before templates belonged to an adapter were evaluated with their
    base's. The file is then removed from this copy of the folder, so that the adapter is used as it
    was evaluated.
    """
    beside = Path(folder) / TEMPLATE_NAME
    if not beside.is_file() or adapter_weights_sha256(folder, template=False) != weights_sha256:
        return False
    beside.unlink()
    return True


def _computed_with(config: Path) -> dict[str, Any]:
    try:
        fields = parse_adapter_config(config.read_bytes())
    except ValueError as error:
        raise AdapterError(f"{config} is not an adapter's configuration", found=error) from error
    return {
        name: sorted(value) if name == "target_modules" and isinstance(value, list) else value
        for name, value in fields.items()
        if name not in _ORIGIN
    }


def _files(folder: Path) -> tuple[tuple[str, int, int], ...]:
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
            f"{folder} is not a base model's folder",
            expected="; ".join(missing),
            found=", ".join(sorted(files)) or "nothing",
        )
    stats = ((name, path.stat()) for name, path in sorted(files.items()))
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _state(base: LoadedBase) -> ModelChecksums:
    parts = model_checksums(base.model).parts
    return ModelChecksums({**parts, **tokenizer_checksums(base.tokenizer).parts})
