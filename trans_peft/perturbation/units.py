"""The parts of a decoder layer that are perturbed, and the shapes of projections."""

from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

__all__ = [
    "Attention",
    "DecoderLayer",
    "Experts",
    "FeedForward",
    "Unit",
    "base_of",
    "projection_shape",
]


@dataclass(frozen=True, eq=False)
class FeedForward:
    """One FFN: `down(act(inputs(x)))`, d -> f -> d.

    Attributes:
        inputs: the projections d -> f, or the fused projection d -> 2f.
        down: the projection f -> d.
        neurons: f.
        container: the smallest module with all parts, which may be the decoder layer.
        whole: a module that returns the output of the FFN only, so that skipping it skips the FFN;
            None if there is none (OPT has no module for its FFN, BLOOM's adds the residual).
        activated: an activation is next to the projections.
        multiplied: why masked neurons are multiplied by zero instead of being sliced; None if they
            are sliced.
        narrows: the FFN can be computed with a width of zero.
    """

    inputs: tuple[nn.Module, ...]
    down: nn.Module
    neurons: int
    container: nn.Module
    whole: nn.Module | None = None
    activated: bool = True
    multiplied: str | None = None
    narrows: bool = True

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules with its weights."""
        return (*self.inputs, self.down)


@dataclass(frozen=True, eq=False)
class Experts:
    """The experts of a mixture, in one module with raw weights.

    Attributes:
        module: the module.
        gates: names of the module's attributes that return the input of the down projection
            (..., neurons): an activation (a module or a function) or the method `_apply_gate`.
        neurons: neurons of one expert.
    """

    module: nn.Module
    gates: tuple[str, ...]
    neurons: int

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The module with their weights."""
        return (self.module,)


Unit = FeedForward | Experts


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention sub-layer; its neurons are the inputs of its output projection."""

    module: nn.Module
    output: nn.Module
    neurons: int


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """One decoder layer.

    Attributes:
        module: the layer.
        ffn: its FFN, in several units if it is a mixture of experts; empty if the layer has none
            (Mamba hybrids).
        attention: its attention; None if it has none or it was not found.
        biased: modules around the FFN that add a constant to its output. A dropped FFN drops the
            constant as well.
    """

    module: nn.Module
    ffn: tuple[Unit, ...]
    attention: Attention | None
    biased: tuple[nn.Module, ...] = ()

    def neurons(self, kind: str) -> tuple[int, ...]:
        """Return the number of neurons of each unit of a sub-layer."""
        if kind == "ffn":
            return tuple(unit.neurons for unit in self.ffn)
        return () if self.attention is None else (self.attention.neurons,)


def base_of(module: nn.Module) -> nn.Module:
    """Return the module under PEFT's layers, or the module itself."""
    while isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return module


def projection_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of a projection, also if it is quantized or adapted; None for other modules.

    A module whose one weight is (experts, out, in), such as JetMoE's, is a projection as well.
    """
    module = base_of(module)
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.nf
    size = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if all(isinstance(n, int) for n in size):
        return size  # type: ignore[return-value]
    if isinstance(module, _ConvNd) or next(module.children(), None) is not None:
        return None
    weights = [p.shape for p in module.parameters(recurse=False) if p.dim() > 1]
    if len(weights) == 1 and len(weights[0]) == 3 and hasattr(module, "output_size"):
        return weights[0][2], weights[0][1]
    return None
