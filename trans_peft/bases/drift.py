"""Measure how far an update moved the weights of a base, for attention and FFNs separately.

Trans-PEFT assumes that updates change the knowledge in FFNs and keep the task patterns of attention
(section 3 of the paper, which compares activations). This module compares weights instead, by the
relative change |new - old| / |old| in Frobenius norms, which needs no data and no forward pass.
Theorem 1 bounds the loss of a transferred adapter by the FFN term.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from trans_peft.bases.checkpoint import folder_checkpoint
from trans_peft.bases.model_check import IMPORTS, LIMITS
from trans_peft.bases.sublayers import SubLayer, sublayers
from trans_peft.domain.base import Fingerprint, TensorSignature
from trans_peft.errors import UnsupportedModelError, listed
from trans_peft.isolation import call_isolated

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Drift", "sampled_drift", "weight_drift", "weight_pairs"]


@dataclass(frozen=True)
class Drift:
    """Change of a base's weights, in Frobenius norms. NaN where there are no such weights.

    Attributes:
        attention: relative change |new - old| / |old| over the attention of all layers, without
            norms.
        ffn: the same over the FFNs of all layers.
        other: the same over all other weights, such as embeddings, norms and routers.
        attention_by_layer: the same for each layer, in order.
        ffn_by_layer: the same for each layer, in order.
        ffn_shift_by_layer: |new - old| of each layer's FFN, in the unit of the weights; 0 for a
            layer without an FFN.
        ffn_norm_by_layer: |old| of each layer's FFN.
        cosine: median cosine between the old and the new values of a matrix. Independent weights
            have 0.
    """

    attention: float
    ffn: float
    other: float
    attention_by_layer: tuple[float, ...]
    ffn_by_layer: tuple[float, ...]
    ffn_shift_by_layer: tuple[float, ...]
    ffn_norm_by_layer: tuple[float, ...]
    cosine: float

    @property
    def ffn_shift(self) -> float:
        """|new - old| over the FFNs of all layers: the first term of theorem 1 without L_f."""
        return math.hypot(*self.ffn_shift_by_layer)


def weight_drift(old: Path, new: Path) -> Drift:
    """Compare two versions of one base, each a Hugging Face folder with safetensors.

    One pair of tensors is in memory at a time, in float32. Raises UnsupportedModelError if the
    folders contain different tensors, if a value is not finite, or if the tensors cannot be
    assigned to sub-layers.
    """
    before, after = folder_checkpoint(old), folder_checkpoint(new)
    shapes = _shared_shapes(before.tensors, after.tensors, f"{old} and {new}")
    return _drift(
        sublayers(before.config, shapes), _exact_changes(_values(old, new, sorted(shapes)))
    )


def sampled_drift(old: Fingerprint, new: Fingerprint, subject: str) -> Drift:
    """Estimate `weight_drift` from the values that fingerprints sample of each tensor.

    No file is read. A fingerprint has 32 values of each tensor, so the estimate of one layer's FFN
    rests on about 100 values, and a change of a few rows can be missed. `subject` names the pair in
    errors. Raises UnsupportedModelError as `weight_drift` does and if a fingerprint has no samples,
    ContentError if config.json does not describe a model, IsolationError.
    """
    shapes = _shared_shapes(old.tensors, new.tensors, subject)
    kinds = _isolated_sublayers(new.config, tuple(sorted(shapes.items())))
    return _drift(kinds, _sampled_changes(old.tensors, new.tensors, subject))


@lru_cache(maxsize=4)
def _isolated_sublayers(
    config: str, shapes: tuple[tuple[str, tuple[int, ...]], ...]
) -> dict[str, SubLayer]:
    """Return `sublayers`, computed in a child process. Versions of one base share the result."""
    found = call_isolated(
        sublayers, config, dict(shapes), subject="the sub-layers of a base", limits=LIMITS,
        imports=IMPORTS,
    )  # fmt: skip
    return {name: (str(kind), int(layer)) for name, (kind, layer) in found.items()}


class _Change(NamedTuple):
    """Sums of squares of one tensor: of its change, of its old values, and its cosine."""

    name: str
    change: float
    before: float
    cosine: float | None


def _drift(kinds: Mapping[str, SubLayer], changes: Iterable[_Change]) -> Drift:
    squares: dict[SubLayer, list[tuple[float, float]]] = defaultdict(list)
    cosines = []
    for found in changes:
        if not math.isfinite(found.change + found.before):
            side = "new" if math.isfinite(found.before) else "old"
            raise UnsupportedModelError(
                f"the tensor {found.name} of the {side} version has values that are not finite",
                do=f"replace the {side} version by a checkpoint with finite weights",
            )
        squares[kinds[found.name]].append((found.change, found.before))
        if found.cosine is not None:
            cosines.append(found.cosine)
    layers = range(1 + max(layer for _, layer in squares))

    def total(wanted: str) -> float:
        every = [pairs for (kind, _), pairs in squares.items() if kind == wanted]
        return _relative([pair for pairs in every for pair in pairs])

    def norm(layer: int, column: int) -> float:
        return math.sqrt(math.fsum(pair[column] for pair in squares.get(("ffn", layer), ())))

    return Drift(
        attention=total("attention"),
        ffn=total("ffn"),
        other=total("other"),
        attention_by_layer=tuple(_relative(squares.get(("attention", n), [])) for n in layers),
        ffn_by_layer=tuple(_relative(squares.get(("ffn", n), [])) for n in layers),
        ffn_shift_by_layer=tuple(norm(n, 0) for n in layers),
        ffn_norm_by_layer=tuple(norm(n, 1) for n in layers),
        cosine=median(cosines) if cosines else math.nan,
    )


def _relative(pairs: list[tuple[float, float]]) -> float:
    change, before = (math.fsum(column) for column in zip(*pairs, strict=True)) if pairs else (0, 0)
    return math.sqrt(change / before) if before else math.nan


def _shared_shapes(
    old: Mapping[str, TensorSignature], new: Mapping[str, TensorSignature], subject: str
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors, if both versions have the same."""
    unshared = sorted(old.keys() ^ new.keys())
    if unshared or not old:
        raise UnsupportedModelError(
            f"{subject} contain different tensors",
            expected=f"{len(old)} tensors in both",
            found=f"only in one of them: {listed(unshared)}" if unshared else "no tensors",
            do="compare versions of one base",
        )
    resized = [
        f"{name}: {before.shape}, then {new[name].shape}"
        for name, before in sorted(old.items())
        if before.shape != new[name].shape
    ]
    if resized:
        raise UnsupportedModelError(
            f"{subject} contain tensors of different shapes",
            expected="the same shapes",
            found=listed(resized),
            do="compare versions of one base",
        )
    return {name: tensor.shape for name, tensor in old.items()}


def _exact_changes(pairs: Iterable[tuple[str, "Tensor", "Tensor"]]) -> Iterator[_Change]:
    for name, before, after in pairs:
        squared = before.square().sum().item()
        cosine = None
        norm = math.sqrt(squared) * after.norm().item()
        if before.dim() > 1 and norm > 0:
            cosine = before.flatten().dot(after.flatten()).item() / norm
        yield _Change(name, (after - before).square_().sum().item(), squared, cosine)


def weight_pairs(old: Path, new: Path) -> Iterator[tuple[str, "Tensor", "Tensor"]]:
    """Return an iterator over (name, old, new) of every tensor of two folders, in float32.

    Raises UnsupportedModelError at once if their tensors have different names or shapes.
    """
    before, after = folder_checkpoint(old).tensors, folder_checkpoint(new).tensors
    return _values(old, new, sorted(_shared_shapes(before, after, f"{old} and {new}")))


def _values(old: Path, new: Path, names: Iterable[str]) -> Iterator[tuple[str, "Tensor", "Tensor"]]:
    from safetensors import safe_open

    with ExitStack() as stack:
        before, after = (
            {
                name: file
                for path in sorted(folder.glob("*.safetensors"))
                for file in [stack.enter_context(safe_open(path, "pt"))]
                for name in file.keys()  # noqa: SIM118 (not a mapping)
            }
            for folder in (old, new)
        )
        for name in names:
            yield name, before[name].get_tensor(name).float(), after[name].get_tensor(name).float()


def _sampled_changes(
    old: Mapping[str, TensorSignature], new: Mapping[str, TensorSignature], subject: str
) -> Iterator[_Change]:
    for name, before in old.items():
        first, second = before.sketch, new[name].sketch
        if not first or len(first) != len(second):
            raise UnsupportedModelError(
                f"the fingerprints of {subject} have no sampled values of {name} in common"
            )
        represented = math.prod(before.shape) / len(first)
        change = math.fsum((b - a) ** 2 for a, b in zip(first, second, strict=True))
        squared = math.fsum(value**2 for value in first)
        yield _Change(name, represented * change, represented * squared, None)
