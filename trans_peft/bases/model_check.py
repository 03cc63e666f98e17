"""Compare a checkpoint with the model that transformers builds from its config.json.

Quantized checkpoints and implausible layer counts are refused before a model is built. Then a child
process with limits builds the model without weights and returns the loading report of transformers
(`meta_model`).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trans_peft.bases.checkpoint import Checkpoint
from trans_peft.bases.meta_model import inspect_checkpoint
from trans_peft.domain.base import TensorSignature
from trans_peft.domain.identity import content_sha256
from trans_peft.errors import ContentError, UploadError, listed
from trans_peft.isolation import CallLimits, call_isolated

__all__ = ["IMPORTS", "LIMITS", "ModelWeight", "check_checkpoint", "compare_with_built_model"]

LIMITS = CallLimits(cpu_s=120, wall_s=900, memory_bytes=4 << 30, file_bytes=128 << 20)
"""Limits of the child process, which builds one model and loads one tokenizer."""

IMPORTS = (  # takes 3 s; the fork server imports them once, for all children
    "transformers.generation.utils", "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama", "peft", "trans_peft.models",
)  # fmt: skip
_LAYERS = re.compile(r"(num|n)_(hidden_|encoder_|decoder_)?layers?|(encoder|decoder)_layers|depth")
_MAX_LABELS = 10_000
_QUANTIZED = ("quantization_config", "compression_config")
_PACKED = re.compile(r"F[468]_|F4$")


_MAX_PASSED = 16


@dataclass(frozen=True)
class ModelWeight:
    """One tensor of the model's state dict; `source` is its name in the files, or None.

    It is None for a tensor that is missing, or made of several tensors of the files.
    """

    name: str
    shape: tuple[int, ...]
    source: str | None


_passed: dict[str, tuple[ModelWeight, ...]] = {}
"""Results by content: converting, publishing and ingesting check the same checkpoint."""


def check_checkpoint(checkpoint: Checkpoint, subject: str) -> tuple[ModelWeight, ...]:
    """Return the weights of the model, if the checkpoint contains exactly those.

    `subject` names the checkpoint in messages. Raises UploadError with all differences: tensors
    that are missing, unexpected or of another shape; tied weights with different values; tokens
    without an embedding row; quantized weights; more layers than tensors; a config or tokenizer
    that transformers cannot load within `LIMITS`. Raises IsolationError if no child process can
    run.
    """
    key = _key(checkpoint)
    if key in _passed:
        return _passed[key]
    config = checkpoint.fields()
    tensors = checkpoint.tensors
    problems = [
        *_quantized(config, tensors),
        *_external_references(config),
        *_implausible_layers(config, len(tensors)),
        *_many_labels(config),
    ]
    weights: tuple[ModelWeight, ...] = ()
    if not problems:
        try:
            problems, weights = compare_with_built_model(checkpoint, subject)
        except ContentError as error:
            problems = [str(error)]
    if problems:
        headline = f"{subject} is refused: its files do not match the model that loads them:"
        raise UploadError("\n  - ".join([headline, *problems]))
    if len(_passed) >= _MAX_PASSED:
        _passed.pop(next(iter(_passed)), None)
    _passed[key] = weights
    return weights


def compare_with_built_model(
    checkpoint: Checkpoint, subject: str
) -> tuple[list[str], tuple[ModelWeight, ...]]:
    """Build the model in a child process; return all differences, and the model's weights.

    Raises ContentError if that fails or exceeds `LIMITS`, IsolationError if no child process can
    run.
    """
    found = call_isolated(
        inspect_checkpoint,
        checkpoint.config,
        [
            (name, tensor.dtype, tensor.shape, tensor.sha256)
            for name, tensor in checkpoint.tensors.items()
        ],
        dict(checkpoint.tokenizer),
        checkpoint.generation,
        subject=f"the model of {subject}",
        limits=LIMITS,
        imports=IMPORTS,
    )
    weights = tuple(
        ModelWeight(name, tuple(shape), source) for name, shape, source in found["weights"]
    )
    return list(found["problems"]), weights


def _key(checkpoint: Checkpoint) -> str:
    tensors = [
        [name, tensor.dtype, list(tensor.shape), tensor.sha256]
        for name, tensor in sorted(checkpoint.tensors.items())
    ]
    texts = [checkpoint.config, dict(checkpoint.tokenizer), checkpoint.generation]
    return content_sha256([texts, tensors])


def _quantized(config: Mapping[str, Any], tensors: Mapping[str, TensorSignature]) -> Iterator[str]:
    do = "publish the model in float32, bfloat16 or float16"
    for path, key, value in _fields(config):
        if key in _QUANTIZED and value:
            yield f"config.json: {path} declares a quantized checkpoint; {do}"
    packed = [name for name, tensor in tensors.items() if _PACKED.match(tensor.dtype)]
    if packed:
        dtypes = sorted({tensors[name].dtype for name in packed})
        yield f"{len(packed)} tensors are quantized ({', '.join(dtypes)}): {listed(packed)}; {do}"


def _external_references(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the fields that would make transformers load other files or code."""
    for path, key, value in _fields(config):
        if key == "transformers_weights" and value:
            yield f"config.json: {path} names weights other than model.safetensors; remove it"
        if "attn_implementation" in key or "experts_implementation" in key:
            values = value.values() if isinstance(value, dict) else [value]
            if any("/" in str(item) for item in values):
                yield f"config.json: {path} names code on a hub, which is never run; remove it"


def _implausible_layers(config: Mapping[str, Any], tensors: int) -> Iterator[str]:
    """Yield layer counts above the number of tensors; every layer has at least one tensor."""
    for path, key, value in _fields(config):
        if _LAYERS.fullmatch(key) and isinstance(value, int) and value > tensors:
            yield f"config.json: {path} is {value:,}, but the files hold {tensors:,} tensors"


def _many_labels(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield label counts for which transformers would build long tables at every load."""
    for path, key, value in _fields(config):
        if key == "num_labels" and isinstance(value, int) and value > _MAX_LABELS:
            yield f"config.json: {path} is {value:,}; a language model has no labels; remove it"


def _fields(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield (path, key, value) of all fields, including nested ones."""
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Mapping):
            for key, item in value.items():
                here = f"{path}.{key}" if path else str(key)
                yield here, str(key), item
                waiting.append((here, item))
        elif isinstance(value, list):
            waiting += [(path, item) for item in value]
