"""Find the FFN and attention sub-layers of a causal language model in its module graph.

Names differ from model to model (mlp, feed_forward, fc1 beside the attention, ...), shapes do not.
A FFN is a module that directly holds one `down` projection (f -> d) and one or two projections
(d -> f), or one fused one (d -> 2f), and, where that is not yet unique, an activation. Experts of a
mixture are a module that holds an activation and two weights of three dimensions. Everything is
found through PEFT's layers, whose base layer stands for them. What has another shape can be stated
by names (`layout.Layout`).
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from trans_peft.errors import UnsupportedModelError

__all__ = [
    "Attention",
    "DecoderLayer",
    "Experts",
    "FeedForward",
    "base_of",
    "find_layers",
    "named_lists",
    "projection_shape",
]

_ACTIVATION_MODULES = ("transformers.activations", "torch.nn.modules.activation")
_OUTPUT_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo", "proj")


@dataclass(frozen=True, eq=False)
class FeedForward:
    """One FFN: `down(act(inputs(x)))`, d -> f -> d, with f = `neurons`.

    `whole` is the module whose output is the FFN's contribution to the residual stream; None where
    the FFN has no module of its own (OPT) or one that does more (BLOOM's adds the residual).
    """

    inputs: tuple[nn.Module, ...]
    down: nn.Module
    neurons: int
    whole: nn.Module | None

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Return what computes it."""
        return (*self.inputs, self.down)


@dataclass(frozen=True, eq=False)
class Experts:
    """The experts of a mixture, in one module: each has the same number of `neurons`."""

    module: nn.Module
    activation: nn.Module
    neurons: int

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Return what computes them."""
        return (self.module,)


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention sub-layer; its neurons are the inputs of its output projection."""

    module: nn.Module
    output: nn.Module
    neurons: int


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """One decoder layer: its FFN (several units in a mixture of experts) and its attention."""

    module: nn.Module
    ffn: tuple[FeedForward | Experts, ...]
    attention: Attention | None

    def neurons(self, kind: str) -> tuple[int, ...]:
        """Return the number of neurons of each unit of a sub-layer."""
        if kind == "ffn":
            return tuple(unit.neurons for unit in self.ffn)
        return () if self.attention is None else (self.attention.neurons,)


def find_layers(model: nn.Module) -> tuple[nn.Module, tuple[DecoderLayer, ...]]:
    """Return the decoder stack (the module that owns the layers) and its layers, in order.

    UnsupportedModelError where there is no such list of layers, or a layer without a FFN.
    """
    lists = [found for found in _outermost_lists(model) if any(map(_units, found[1]))]
    count = _layer_count(model)
    chosen = [found for found in lists if len(found[1]) == count] if len(lists) > 1 else lists
    if len(chosen) != 1:
        raise UnsupportedModelError(
            f"the FFN sub-layers of {type(model).__name__} were not found",
            expected="one ModuleList of decoder layers, each with a FFN: a projection f -> d "
            "beside one or two d -> f or a fused one d -> 2f, or experts in 3-d weights",
            found=[name for name, _, _ in named_lists(model)] or "no ModuleList at all",
            do="state where they are: perturbed(..., layout=Layout(...))",
        )
    owner, modules = chosen[0]
    layers = tuple(DecoderLayer(module, _units(module), None) for module in modules)
    without = [index for index, layer in enumerate(layers) if not layer.ffn]
    if without:
        raise UnsupportedModelError(
            f"layers {without} of {type(model).__name__} have no FFN that could be found",
            expected="in every layer a projection f -> d beside one or two projections d -> f",
            found=sorted({type(layers[index].module).__name__ for index in without}),
            do="state where they are: perturbed(..., layout=Layout(...))",
        )
    return owner, tuple(
        DecoderLayer(layer.module, layer.ffn, _attention(layer.module, layer.ffn))
        for layer in layers
    )


def base_of(module: nn.Module) -> nn.Module:
    """Return the module under PEFT's layers, or the module itself."""
    while isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return module


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield (name, child as the model calls it, child under PEFT's layers)."""
    for name, child in module.named_children():
        yield name, child, base_of(child)


def projection_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of a projection, quantised and adapted ones included; None of others."""
    module = base_of(module)
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.nf
    size = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return size if all(isinstance(n, int) for n in size) else None  # type: ignore[return-value]


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ in _ACTIVATION_MODULES


def named_lists(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.ModuleList]]:
    """Yield (path, owner, list) of every ModuleList in a model."""
    for name, module in model.named_modules():
        for child_name, child in module.named_children():
            if isinstance(child, nn.ModuleList):
                yield f"{name}.{child_name}".lstrip("."), module, child


def _outermost_lists(model: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    found = list(named_lists(model))
    nested = {id(inner) for _, _, outer in found for inner in outer.modules() if inner is not outer}
    return [(owner, list(items)) for _, owner, items in found if id(items) not in nested]


def _layer_count(model: nn.Module) -> int | None:
    for module in model.modules():
        text_config = getattr(getattr(module, "config", None), "get_text_config", None)
        if text_config is not None:
            return getattr(text_config(), "num_hidden_layers", None)
    return None


def _units(layer: nn.Module) -> tuple[FeedForward | Experts, ...]:
    """Return the FFN units of one decoder layer, in the order of the module graph."""
    certain: list[FeedForward | Experts] = []
    likely: list[FeedForward | Experts] = []

    def visit(called: nn.Module, module: nn.Module) -> None:
        children = list(_children(module))
        activations = [base for _, _, base in children if _is_activation(base)]
        unit: FeedForward | Experts | None = _feed_forward(
            None if called is layer else called, children
        )
        if unit is None and activations:
            unit = _experts(module, activations[0])
        if unit is not None:
            (certain if activations else likely).append(unit)
        for _, child, base in children:
            visit(child, base)

    visit(layer, layer)
    if certain:
        return tuple(certain)
    return tuple(likely) if len(likely) == 1 else ()


def _feed_forward(
    whole: nn.Module | None, children: list[tuple[str, nn.Module, nn.Module]]
) -> FeedForward | None:
    """Match the direct children of a module against the shapes of a FFN."""
    projections = [
        (child, size) for _, child, base in children if (size := projection_shape(base)) is not None
    ]
    # Where d == f every order fits: the down projection is the one registered last.
    for down, (f, d) in reversed(projections):
        rest = [(child, size) for child, size in projections if child is not down]
        sizes = [size for _, size in rest]
        if sizes in ([(d, f)], [(d, f), (d, f)], [(d, 2 * f)]):
            inputs = tuple(child for child, _ in rest)
            return FeedForward(inputs, down, f, whole if _is_contribution(whole) else None)
    return None


def _is_contribution(whole: nn.Module | None) -> bool:
    """Whether a module turns x alone into something that is added to the residual stream."""
    if whole is None:
        return False
    parameters = inspect.signature(type(base_of(whole)).forward).parameters.values()
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD,)
    ]
    return len(required) == 2  # self and x


def _experts(module: nn.Module, activation: nn.Module) -> Experts | None:
    weights = [weight.shape for weight in module.parameters(recurse=False) if weight.dim() == 3]
    if len(weights) != 2:
        return None
    into, down = weights
    d, f = (down[2], down[1]) if getattr(module, "is_transposed", False) else (down[1], down[2])
    if sorted(into[1:]) in (sorted((d, 2 * f)), sorted((d, f))):
        return Experts(module, activation, f)
    return None


def _attention(layer: nn.Module, ffn: tuple[FeedForward | Experts, ...]) -> Attention | None:
    """Return the one child of a layer with projections that is no FFN; None if there are others."""
    ours = {id(module) for unit in ffn for module in unit.modules}
    candidates = []
    for _, child, base in _children(layer):
        inside = list(base.modules())
        if any(id(module) in ours for module in inside) or projection_shape(base) is not None:
            continue
        projections = [
            (name, called, size)
            for name, called, module in _children(base)
            if (size := projection_shape(module)) is not None
        ]
        if projections:
            candidates.append((child, projections))
    if len(candidates) != 1:
        return None
    module, projections = candidates[0]
    width = next((size[1] for unit in ffn if (size := _shape_of_down(unit))), None)
    outputs = [p for p in projections if width is None or p[2][1] == width]
    named = [p for p in outputs if p[0] in _OUTPUT_NAMES]
    chosen = outputs if len(outputs) == 1 else named
    if len(chosen) != 1:
        return None
    _, output, (neurons, _) = chosen[0]
    return Attention(module, output, neurons)


def _shape_of_down(unit: FeedForward | Experts) -> tuple[int, int] | None:
    return projection_shape(unit.down) if isinstance(unit, FeedForward) else None
