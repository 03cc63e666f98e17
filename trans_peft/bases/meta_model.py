"""Build the model of a checkpoint without weights, and report the differences between the two.

transformers builds the model on torch's `meta` device and loads tensors that have shapes but no
content. Its loading report (`output_loading_info`) therefore handles renamed and converted tensors,
fused experts and tied weights exactly as a real load does. config.json is untrusted: call
`inspect_checkpoint` through `trans_peft.isolation`.
"""

import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trans_peft.bases.checkpoint import GENERATION
from trans_peft.errors import listed
from trans_peft.isolation import is_memory_limit_error
from trans_peft.loading import is_text_backbone, loading_problems, unexpected_names

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["build_model", "inspect_checkpoint"]

_PREFIX = "trans-peft-model-"
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_INTEGERS = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
}  # fmt: skip
MAX_BUFFER_BYTES = 4 << 30
"""Limit on the buffers that a model computes when it is built, such as position tables."""


def inspect_checkpoint(
    config: str,
    tensors: Sequence[Sequence[Any]],
    tokenizer: Mapping[str, str],
    generation: str = "",
) -> dict[str, Any]:
    """Return all differences between a checkpoint and its model, and the model's weights.

    `config` is the text of config.json. `tensors` are (name in the files, dtype in the spelling of
    safetensors, shape, sha256 or ""). `tokenizer` maps file names to texts; empty to leave out the
    tokenizer. `generation` is the text of generation_config.json; empty without the file. The
    result has `problems`, a list of sentences, and `weights`, a list of (name in the model, shape,
    name in the files) for each tensor of the model's state dict; the last one is None for a weight
    that is missing or converted from several tensors.
    """
    try:
        full_config, built = build_model(config)
        model_class = type(built)
        checkpoint = _Checkpoint(tensors)
        loaded = _load(model_class, built.config, checkpoint)
    except Exception as error:  # with an untrusted config any line of transformers can fail
        if is_memory_limit_error(error):
            raise MemoryError(str(error)) from error
        return {
            "problems": [
                "config.json: transformers cannot build and load its model:"
                f" {type(error).__name__}: {_first_lines(error)}",
            ],
            "weights": [],
        }
    unexpected = unexpected_names(loaded.model, loaded.unexpected)
    if unexpected and is_text_backbone(model_class, full_config):
        unexpected = _unexpected_by_full_model(full_config, checkpoint, unexpected)
    problems = [
        *loading_problems(loaded.missing, unexpected, loaded.mismatched),
        *(f"{name}: its tensors in the files do not convert: {why}" for name, why in loaded.broken),
        *_masks_with_weight_shapes(loaded, checkpoint),
        *_integer_weights(loaded, checkpoint),
        *_different_tied_weights(loaded.model, checkpoint),
        *_large_buffers(loaded.model),
        *_tokenizer_problems(loaded.model, config, tokenizer),
        *_generation_problems(loaded.model, generation),
    ]
    weights = [
        [name, list(tensor.shape), checkpoint.source(tensor)]
        for name, tensor in loaded.model.state_dict(keep_vars=True).items()
        if hasattr(tensor, "shape")
    ]
    return {"problems": problems, "weights": weights}


def build_model(config: str) -> tuple["PreTrainedConfig", "PreTrainedModel"]:
    """Return the config and the causal language model of a config.json, on the meta device.

    `config` is the text of the file. With an untrusted text any line of transformers can fail.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder:
        (Path(folder) / "config.json").write_text(config, encoding="utf-8")
        full = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        return full, AutoModelForCausalLM.from_config(full, trust_remote_code=False)


class _Checkpoint:
    """Tensors with the shapes of a checkpoint, on the meta device.

    All floating-point tensors are views of one flat tensor, each at its own offset. The offset
    identifies the tensor that a weight of the loaded model came from.
    """

    def __init__(self, tensors: Sequence[Sequence[Any]]) -> None:
        import torch

        self.dtypes = {name: dtype for name, dtype, _, _ in tensors}
        self.shapes = {name: tuple(shape) for name, _, shape, _ in tensors}
        self.hashes = {name: sha256 for name, _, _, sha256 in tensors}
        floats = [name for name in self.shapes if self.dtypes[name] in _FLOATS]
        total = 1 + sum(max(1, math.prod(self.shapes[name])) for name in floats)
        flat = torch.empty(total, dtype=torch.float32, device="meta")
        self._names: dict[int, str] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        offset = 1  # 0 is the offset of all tensors that are computed
        for name, shape in self.shapes.items():
            if self.dtypes[name] in _FLOATS:
                size = math.prod(shape)
                self._names[offset] = name
                self.tensors[name] = flat[offset : offset + size].view(shape)
                offset += max(1, size)
            else:
                dtype = getattr(torch, _INTEGERS.get(self.dtypes[name], "uint8"))
                self.tensors[name] = torch.empty(shape, dtype=dtype, device="meta")

    def source(self, tensor: "torch.Tensor") -> str | None:
        """Return the tensor of the files that a weight is identical to, or None."""
        name = self._names.get(int(tensor.storage_offset()))
        same = (
            name is not None
            and tuple(tensor.shape) == self.shapes[name]
            and tensor.stride() == self.tensors[name].stride()
        )
        return name if same else None


@dataclass(frozen=True)
class _Loaded:
    model: "PreTrainedModel"
    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, Any, Any]]
    broken: list[tuple[str, str]]


def _load(
    model_class: Any,
    config: "PreTrainedConfig",
    checkpoint: _Checkpoint,
    leave_out: frozenset[str] = frozenset(),
) -> _Loaded:
    import torch

    tensors = {name: t for name, t in checkpoint.tensors.items() if name not in leave_out}
    with _capturing_reports() as reports:
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map={"": "meta"},
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    broken = {
        name: _first_lines(str(why).strip().rpartition("\n")[2])
        for found in reports
        for name, why in getattr(found, "conversion_errors", {}).items()
    }
    missing = [name for name in report["missing_keys"] if name not in broken]
    return _Loaded(
        model,
        missing,
        list(report["unexpected_keys"]),
        list(report["mismatched_keys"]),
        sorted(broken.items()),
    )


@contextmanager
def _capturing_reports() -> Iterator[list[Any]]:
    """Collect loading reports, which transformers would log or raise as one error."""
    from transformers import modeling_utils
    from transformers.utils import logging

    reports: list[Any] = []

    def collect(*, loading_info: Any, **_: Any) -> None:
        reports.append(loading_info)

    original, shown = modeling_utils.log_state_dict_report, logging.is_progress_bar_enabled()
    modeling_utils.log_state_dict_report = collect
    logging.disable_progress_bar()
    try:
        yield reports
    finally:
        modeling_utils.log_state_dict_report = original
        if shown:
            logging.enable_progress_bar()


def _unexpected_by_full_model(
    config: "PreTrainedConfig", checkpoint: _Checkpoint, unexpected: list[str]
) -> list[str]:
    """Return the tensors that the full multimodal model does not have either."""
    import transformers

    for name in config.architectures or ():
        full = getattr(transformers, str(name), None)
        if isinstance(full, type) and getattr(full, "config_class", None) is type(config):
            loaded = _load(full, config, checkpoint)
            return unexpected_names(loaded.model, loaded.unexpected)
    return unexpected


def _masks_with_weight_shapes(loaded: _Loaded, checkpoint: _Checkpoint) -> list[str]:
    """Return the tensors with the name of a removed constant but the shape of a weight."""
    kept = set(unexpected_names(loaded.model, loaded.unexpected))
    found = []
    for name in set(loaded.unexpected) - kept:
        for stored, shape in checkpoint.shapes.items():
            same = name == stored or name.endswith(f".{stored}")
            if same and name.endswith(".bias") and len(shape) == 1 and shape[0] > 1:
                found.append(stored)
    return loading_problems(unexpected=found)


def _integer_weights(loaded: _Loaded, checkpoint: _Checkpoint) -> list[str]:
    """Return the integer tensors that would be loaded as floating-point weights."""
    integers = frozenset(n for n, dtype in checkpoint.dtypes.items() if dtype not in _FLOATS)
    if not integers:
        return []
    without = _load(type(loaded.model), loaded.model.config, checkpoint, integers)
    weights = without.model.state_dict()
    filled = set(without.missing) - set(loaded.missing)
    names = sorted(name for name in filled if weights[name].is_floating_point())
    dtypes = ", ".join(sorted({checkpoint.dtypes[name] for name in integers}))
    return [
        f"{name}: the files contain integers ({dtypes}), as in a quantized model" for name in names
    ]


def _different_tied_weights(model: "PreTrainedModel", checkpoint: _Checkpoint) -> list[str]:
    """Return the weights that the config ties, but which have different values in the files."""
    problems = []
    for target, source in model.all_tied_weights_keys.items():
        names = [checkpoint.source(model.get_parameter(name)) for name in (target, source)]
        hashes = [checkpoint.hashes[name] for name in names if name is not None]
        if len(hashes) == 2 and all(hashes) and hashes[0] != hashes[1]:
            problems.append(
                f"config.json ties {target} to {source}, but their values in the files differ; set"
                " tie_word_embeddings to false, or remove one of them"
            )
    return problems


def _large_buffers(model: "PreTrainedModel") -> list[str]:
    saved = model.state_dict().keys()
    size = sum(b.numel() * b.element_size() for n, b in model.named_buffers() if n not in saved)
    if size <= MAX_BUFFER_BYTES:
        return []
    return [
        f"config.json: position tables and masks of this size need {size:,} bytes; at most"
        f" {MAX_BUFFER_BYTES:,} are allowed"
    ]


def _tokenizer_problems(
    model: "PreTrainedModel", config: str, files: Mapping[str, str]
) -> list[str]:
    """Return why the tokenizer cannot be used at all, or with this model."""
    from trans_peft.models import load_tokenizer
    from trans_peft.text.probe import tokenizer_problems

    if not files:
        return []
    try:
        with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder:
            # transformers chooses the tokenizer's class by config.json, too.
            for name, text in {**files, "config.json": config}.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8", errors="surrogatepass")
            tokenizer = load_tokenizer(Path(folder))
        problems = tokenizer_problems(tokenizer)
    except Exception as error:
        if is_memory_limit_error(error):
            raise MemoryError(str(error)) from error
        return [f"the tokenizer cannot be used: {type(error).__name__}: {_first_lines(error)}"]
    return problems + _tokens_without_rows(model, tokenizer.get_vocab())


def _generation_problems(model: "PreTrainedModel", text: str) -> list[str]:
    """Return why generation_config.json cannot be loaded, or which end tokens do not exist."""
    from transformers import GenerationConfig

    from trans_peft.models import end_token_problems

    if text:
        try:
            with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder:
                (Path(folder) / GENERATION).write_text(text, encoding="utf-8")
                model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:
            if is_memory_limit_error(error):
                raise MemoryError(str(error)) from error
            return [f"{GENERATION} cannot be loaded: {type(error).__name__}: {_first_lines(error)}"]
    return end_token_problems(model)


def _tokens_without_rows(model: "PreTrainedModel", tokens: Mapping[str, int]) -> list[str]:
    """Return the tokens whose ids exceed the rows of the embedding or of the output head."""
    problems = []
    for part, rows in _rows(model).items():
        beyond = sorted((i, token) for token, i in tokens.items() if not 0 <= i < rows)
        if beyond:
            shown = listed([f"{token!r} ({i})" for i, token in beyond])
            problems.append(
                f"the tokenizer has tokens without a row in the {part}, which has {rows} rows:"
                f" {shown}"
            )
    return problems


def _rows(model: "PreTrainedModel") -> dict[str, int]:
    rows = {}
    for part, get in (
        ("embedding", model.get_input_embeddings),
        ("output head", model.get_output_embeddings),
    ):
        try:
            weight = getattr(get(), "weight", None)
        except NotImplementedError:
            continue
        if weight is not None and weight.dim() == 2:
            rows[part] = weight.shape[0]
    if not rows and isinstance(size := getattr(model.config, "vocab_size", None), int):
        rows["model"] = size
    return rows


def _first_lines(error: object, length: int = 600) -> str:
    text = " ".join(str(error).split())
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}/{_PREFIX}\w+", "the upload", text)
    return text if len(text) <= length else f"{text[:length]}..."
