"""Several adapters on one base at once: each row of a batch has its own adapter.

A linear layer with an adapter computes, for the input x and the base's own output y = W x + b,

    y * factor + offset + up (down x),    with x * inputs in place of x before W

where LoRA has `down` and `up`, DoRA all but `inputs`, and IA3 `inputs` or `factor`. The products of
the base are computed once for all rows, and the small rest adapter by adapter. This is what PEFT
computes for a mixed batch (its argument `adapter_names`), also for adapters of different methods,
and with the column norms of DoRA computed once instead of in every pass.

Adapters of other methods, and those whose logits in a mixed batch differ from their logits alone by
more than rounding, are left out with the reason. The caller evaluates them one by one.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trans_peft.checksums import model_checksums
from trans_peft.errors import (
    AdapterError,
    InvalidSpecError,
    UnsupportedModelError,
    listed,
)
from trans_peft.rounding import difference_beyond_rounding
from trans_peft.snapshot import ModelSnapshot
from trans_peft.transfer.load_adapter import attach

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["MixedModel", "attached_together"]

_PROBE_TOKENS = 8
_ROUNDINGS = 8  # of a whole model, as in trans_peft.validation.decoding.cache_support


@dataclass(frozen=True)
class _Part:
    """What one adapter adds to one linear layer. None: nothing.

    Attributes:
        inputs: factors of the layer's inputs, of shape (in,).
        factor: factors of the layer's outputs, of shape (out,).
        offset: what is added to the outputs after `factor`, of shape (out,).
        down: of shape (in, rank).
        up: of shape (rank, out), with the scale of the adapter.
    """

    inputs: Tensor | None = None
    factor: Tensor | None = None
    offset: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None

    def on(self, device: torch.device) -> "_Part":
        """Return the part on the device of a pass. Between passes weights may be elsewhere."""
        tensors = {name: value for name, value in vars(self).items() if value is not None}
        return _Part(**{name: value.to(device) for name, value in tensors.items()})

    def added_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the outputs with the adapter, in the dtype of y."""
        result = y
        if self.factor is not None:
            result = result * self.factor
        if self.offset is not None:
            result = result + self.offset
        if self.down is not None and self.up is not None:
            result = result + x.to(self.down.dtype) @ self.down @ self.up
        return result.to(y.dtype)


@dataclass
class _Batch:
    """The rows of the current forward pass: (adapter, its rows). Empty: the bare base."""

    runs: list[tuple[str, slice]] = field(default_factory=list)
    rows: int = 0


class _Layer:
    """The parts of all adapters at one linear layer, as two hooks."""

    def __init__(self, name: str, batch: _Batch) -> None:
        self.parts: dict[str, _Part] = {}
        self._name, self._batch = name, batch

    def before(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Scale the inputs of the rows whose adapter does so."""
        scaled = [(part.inputs, rows) for part, rows in self._present() if part.inputs is not None]
        if not scaled:
            return None
        x = self._checked(args[0]).clone()
        for factor, rows in scaled:
            x[rows] = (x[rows] * factor.to(x.device)).to(x.dtype)
        return x, *args[1:]

    def after(self, _module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        """Add the parts to the outputs, in place."""
        for part, rows in self._present():
            if part.factor is not None or part.down is not None:
                y[rows] = part.on(y.device).added_to(y[rows], self._checked(args[0])[rows])

    def _present(self) -> list[tuple[_Part, slice]]:
        return [(self.parts[a], rows) for a, rows in self._batch.runs if a in self.parts]

    def _checked(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[0] != self._batch.rows:
            raise UnsupportedModelError(
                f"{self._name} does not receive the rows of a batch one by one",
                expected=f"inputs of the shape ({self._batch.rows}, tokens, features)",
                found=tuple(x.shape),
                do="evaluate the adapters one by one",
            )
        return x


class MixedModel(nn.Module):
    """A base with several adapters. `adapter_names` of a call has the adapter of each row.

    Attributes:
        adapters: names of the adapters that are attached.
        left_out: names of the others, with the reason.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self._base = base
        self._batch = _Batch()
        self._layers: dict[str, _Layer] = {}
        self.adapters: tuple[str, ...] = ()
        self.left_out: dict[str, str] = {}

    def get_base_model(self) -> nn.Module:
        """Return the base, which computes without adapters when it is called directly."""
        return self._base

    def get_input_embeddings(self) -> nn.Module:
        """Return the base's input embeddings."""
        return self._base.get_input_embeddings()  # type: ignore[operator]

    @property
    def config(self) -> Any:
        """The base's config."""
        return self._base.config

    @property
    def generation_config(self) -> Any:
        """The base's generation config, or None."""
        return getattr(self._base, "generation_config", None)

    def forward(self, *, adapter_names: Sequence[str | None], **inputs: Any) -> Any:
        """Run the base, each row with its adapter. None: the bare base.

        Raises InvalidSpecError for an adapter that is not attached.
        """
        if unknown := {*adapter_names} - {*self.adapters, None}:
            raise InvalidSpecError(
                "rows have adapters that are not attached",
                expected=f"one of {', '.join(self.adapters) or 'no adapters'}",
                found=", ".join(map(str, unknown)),
                do="leave out the adapters that `left_out` names",
            )
        self._batch.runs = list(_runs(adapter_names))
        self._batch.rows = len(adapter_names)
        try:
            return self._base(**inputs)
        finally:
            self._batch.runs = []

    def add(self, adapter: str, parts: Mapping[str, _Part]) -> None:
        """Add the parts of an adapter, by the name of their layer."""
        for name, part in parts.items():
            if name not in self._layers:
                layer = self._layers[name] = _Layer(name, self._batch)
                module = self._base.get_submodule(name)
                module.register_forward_pre_hook(layer.before)
                module.register_forward_hook(layer.after)
            self._layers[name].parts[adapter] = part
        self.adapters += (adapter,)

    def leave_out(self, adapter: str, reason: str) -> None:
        """Remove an adapter, or record that it was not added."""
        for layer in self._layers.values():
            layer.parts.pop(adapter, None)
        self.adapters = tuple(name for name in self.adapters if name != adapter)
        self.left_out[adapter] = reason


@contextmanager
def attached_together(model: nn.Module, folders: Mapping[str, Path]) -> Iterator[MixedModel]:
    """Load the adapters in `folders`, by name, on a base for a block, and restore the base.

    Each adapter is loaded with `attach`, with all of its checks. One that cannot be loaded, or
    cannot share a batch, is in `left_out` and affects no other adapter.

    Raises UnsupportedModelError if the base was changed in the block, for example by merging.
    """
    before, snapshot = model_checksums(model), ModelSnapshot(model)
    mixed, alone = MixedModel(model), dict[str, Tensor]()
    loaded: dict[str, dict[str, _Part]] = {}
    for name, folder in folders.items():
        try:
            loaded[name], alone[name] = _read(model, folder, snapshot)
        except (AdapterError, UnsupportedModelError) as error:
            mixed.left_out[name] = str(error)
    try:
        for name, parts in loaded.items():
            mixed.add(name, parts)
        for name, reason in _different(mixed, alone).items():
            mixed.leave_out(name, reason)
        yield mixed
    finally:
        snapshot.restore()
    if changed := before.changes(model_checksums(model)):
        raise UnsupportedModelError(
            "the weights of the base were changed while adapters were attached",
            found=listed(changed, 3),
            do="load the base again",
        )


def _read(
    model: nn.Module, folder: Path, snapshot: ModelSnapshot
) -> tuple[dict[str, _Part], Tensor]:
    """Return the parts of an adapter and its logits on the probe. The base is restored."""
    try:
        adapted = attach(model, folder)
        parts = _parts(adapted)
        with torch.no_grad():
            logits = adapted(input_ids=_probe(model), use_cache=False).logits[0]
    finally:
        snapshot.restore()
    return parts, logits


def _different(mixed: MixedModel, alone: Mapping[str, Tensor]) -> dict[str, str]:
    """Return why adapters cannot share a batch, found by running all of them on the probe."""
    if not alone:
        return {}
    ids = _probe(mixed.get_base_model()).repeat(len(alone), 1)
    try:
        with torch.no_grad():
            found = mixed(adapter_names=[*alone], input_ids=ids, use_cache=False).logits
    except UnsupportedModelError as error:
        return dict.fromkeys(alone, str(error))
    reason = "its logits in a mixed batch differ from those alone by more than rounding"
    return {
        name: reason
        for row, (name, logits) in enumerate(alone.items())
        if difference_beyond_rounding(found[row], logits, _ROUNDINGS) is not None
    }


def _probe(model: nn.Module) -> Tensor:
    """Return token ids from the middle of the vocabulary, of shape (1, tokens)."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    size = weight.shape[0]
    ids = [size // 4 + i * 7 % max(size // 2, 1) for i in range(_PROBE_TOKENS)]
    return torch.tensor([ids], device=weight.device)


def _runs(adapter_names: Sequence[str | None]) -> Iterator[tuple[str, slice]]:
    """Yield each adapter with consecutive rows that have it."""
    start = 0
    for name, rows in groupby(adapter_names):
        end = start + len(list(rows))
        if name is not None:
            yield name, slice(start, end)
        start = end


def _parts(adapted: "PeftModel") -> dict[str, _Part]:
    """Return the parts of the active adapter. UnsupportedModelError if it has others."""
    from peft.tuners import ia3, lora
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if adapted.peft_type not in ("LORA", "IA3"):
        raise _not_mixed(f"the method {getattr(adapted.peft_type, 'value', adapted.peft_type)}")
    parts = {}
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, AuxiliaryTrainingWrapper):
            raise _not_mixed(f"a trained copy of {name}")
        if not isinstance(layer, BaseTunerLayer):
            continue
        if type(layer) is lora.Linear:
            parts[name] = _lora_part(layer)
        elif type(layer) is ia3.Linear:
            parts[name] = _ia3_part(layer)
        else:
            raise _not_mixed(f"a layer of {type(layer).__module__}.{type(layer).__name__} ({name})")
    return parts


def _lora_part(layer: Any) -> _Part:
    from peft.tuners.lora.variants import DoraLinearVariant
    from peft.utils.integrations import dequantize_module_weight

    (name,) = layer.active_adapters
    variant = layer.lora_variant.get(name)
    if layer.lora_bias[name]:
        raise _not_mixed("the option lora_bias")
    if variant is not None and type(variant) is not DoraLinearVariant:
        raise _not_mixed(f"the variant {type(variant).__name__}")
    a, b, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    down, up = a.weight.T.contiguous(), (b.weight * scale).T.contiguous()
    if variant is None:
        return _Part(down=down, up=up)
    dora = layer.lora_magnitude_vector[name]
    base = layer.get_base_layer()
    weight = dequantize_module_weight(base).to(a.weight.dtype)
    norm = dora.get_weight_norm(weight, dora.get_lora_weight(a, b), scale)
    factor = dora.weight / norm
    return _Part(
        factor=factor,
        offset=None if base.bias is None else (1 - factor) * base.bias,
        down=down,
        up=up * factor,
    )


def _ia3_part(layer: Any) -> _Part:
    (name,) = layer.active_adapters
    scale = layer.ia3_l[name].flatten()
    return _Part(inputs=scale) if layer.is_feedforward else _Part(factor=scale)


def _not_mixed(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "the adapter cannot share a batch with others",
        expected="LoRA, DoRA or IA3 on linear layers",
        found=what,
    )
