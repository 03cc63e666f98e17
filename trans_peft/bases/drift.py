"""Measure how far an update moved the weights of a base, for attention and FFNs separately.

Trans-PEFT assumes that updates change the knowledge in FFNs and keep the task patterns of attention
(section 3 of the paper, which compares activations). This module compares weights instead, by the
relative change |new - old| / |old| in Frobenius norms, which needs no data and no forward pass.
Theorem 1 bounds the loss of a transferred adapter by the FFN term.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trans_peft.errors import UnsupportedModelError, listed
from trans_peft.perturbation.ffn import find_layers

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Drift", "weight_drift", "weight_pairs"]


@dataclass(frozen=True)
class Drift:
    """Relative change of a base's weights, |new - old| / |old|.

    Attributes:
        attention: over the attention of all layers, without norms.
        ffn: over the FFNs of all layers, without norms.
        other: over all other weights, such as embeddings, norms and routers.
        attention_by_layer: of each layer, in order.
        ffn_by_layer: of each layer, in order.
    """

    attention: float
    ffn: float
    other: float
    attention_by_layer: tuple[float, ...]
    ffn_by_layer: tuple[float, ...]


def weight_drift(old: Path, new: Path) -> Drift:
    """Compare two versions of one base, each a Hugging Face folder with safetensors.

    One pair of tensors is in memory at a time, in float32. Raises UnsupportedModelError if the
    folders contain different tensors, or tensors that the model does not have, or if the attention
    of a layer is not found.
    """
    sublayers = _sublayers(old)
    squares: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, before, after in weight_pairs(old, new):
        if name not in sublayers:
            raise UnsupportedModelError(
                f"{name} in {old} is not a weight of the model that config.json describes"
            )
        change = squares[sublayers[name]]
        change[0] += (after - before).square().sum().item()
        change[1] += before.square().sum().item()

    def over_layers(wanted: str) -> float:
        return _relative([change for (kind, _), change in squares.items() if kind == wanted])

    def by_layer(kind: str) -> tuple[float, ...]:
        layers = 1 + max(layer for _, layer in squares)
        return tuple(_relative([squares[kind, layer]]) for layer in range(layers))

    return Drift(
        attention=over_layers("attention"),
        ffn=over_layers("ffn"),
        other=over_layers("other"),
        attention_by_layer=by_layer("attention"),
        ffn_by_layer=by_layer("ffn"),
    )


def _relative(changes: list[list[float]]) -> float:
    before = math.fsum(square for _, square in changes)
    change = math.fsum(square for square, _ in changes)
    return math.sqrt(change / before) if before else 0.0


def _sublayers(folder: Path) -> dict[str, tuple[str, int]]:
    """Return weight -> (sub-layer, layer), ("other", -1) for weights of neither kind."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    owner: dict[int, tuple[str, int]] = {}
    for index, layer in enumerate(find_layers(model)[1]):
        if layer.attention is None:
            raise UnsupportedModelError(f"the attention of layer {index} was not found in {folder}")
        owner |= dict.fromkeys(_weights(layer.attention.module), ("attention", index))
        for unit in layer.ffn:
            for module in unit.modules:
                owner |= dict.fromkeys(_weights(module), ("ffn", index))
    return {
        name: owner.get(id(parameter), ("other", -1))
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _weights(module: "nn.Module") -> Iterator[int]:
    return (id(parameter) for parameter in module.parameters())


def weight_pairs(old: Path, new: Path) -> Iterator[tuple[str, "Tensor", "Tensor"]]:
    """Yield (name, old, new) of every tensor, in float32."""
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
        unshared = sorted(before.keys() ^ after.keys())
        if unshared or not before:
            raise UnsupportedModelError(
                f"{old} and {new} contain different tensors",
                expected=f"{len(before)} tensors in both",
                found=f"only in one of them: {listed(unshared)}" if unshared else "no tensors",
            )
        for name in sorted(before):
            first, second = before[name].get_tensor(name), after[name].get_tensor(name)
            if first.shape != second.shape:
                raise UnsupportedModelError(
                    f"{name} has different shapes",
                    expected=tuple(first.shape),
                    found=tuple(second.shape),
                )
            yield name, first.float(), second.float()
