"""Find candidates for FFNs in the decoder layers of a causal language model, by shape.

Names differ between models (mlp, feed_forward, fc1 next to the attention, ...); shapes do not. An
FFN is a `down` projection (f -> d) with one or two projections (d -> f), or one fused projection
(d -> 2f), in one module or in two adjacent ones (BERT's `intermediate` and `output`). The experts
of a mixture are a module with raw weights of three dimensions and an activation. A PEFT layer
counts as its base layer. Shapes alone do not prove an FFN: `verified` runs the layers. For other
shapes, `layout.Layout` names the sub-layers.
"""

import inspect
import re
from collections.abc import Container, Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from trans_peft.errors import UnsupportedModelError
from trans_peft.perturbation.units import (
    Attention,
    DecoderLayer,
    Experts,
    FeedForward,
    Unit,
    base_of,
    projection_shape,
)

__all__ = [
    "attention_of",
    "candidate_layers",
    "find_layers",
    "is_norm",
    "is_other",
    "named_lists",
    "preferred",
]

_ACTIVATION_MODULES = ("transformers.activations", "torch.nn.modules.activation")
_ACTIVATION = re.compile(r"(^|_)act(ivation)?(_fn|_func|_function)?$")
_OUTPUT_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo", "Wo", "proj", "attention_out")
_OTHER = re.compile(
    r"per_layer_|laurel|altup"  # Gemma: embeddings of each layer, low-rank residual, stream mixing
    r"|hyper_connection|(^|_)hc($|_)"  # mixing of several residual streams
    r"|latent_proj"  # Nemotron-H: linear maps around the experts
    r"|adapter_modules"  # X-MOD: an adapter for each language
)
"""Names of parts of a decoder layer with weights that are neither FFN nor attention."""


_NORM = re.compile(
    r"(Layer|RMS|RMSN|Batch|Group|Instance|Scale|L1|L2)_?Norm(\d+d)?$", re.IGNORECASE
)


def is_other(name: str) -> bool:
    """Whether a module's name is that of a known part of a layer without an FFN."""
    return _OTHER.search(name) is not None


def is_norm(module: nn.Module) -> bool:
    """Whether the class of a module is a normalization."""
    return _NORM.search(type(module).__name__) is not None


def find_layers(model: nn.Module) -> tuple[nn.Module, tuple[DecoderLayer, ...]]:
    """Return the decoder stack (the module that owns the layers) and its layers, in order.

    Only shapes are used, so the model may be on any device, `meta` included.
    UnsupportedModelError unless there is exactly one such list of layers, each with an FFN.
    """
    owner, candidates = candidate_layers(model)
    layers = tuple(replace(layer, ffn=preferred(layer.ffn)) for layer in candidates)
    without = [index for index, layer in enumerate(layers) if not layer.ffn]
    if without:
        raise UnsupportedModelError(
            f"layers {without} of {type(model).__name__} have no recognizable FFN",
            expected="in every layer a projection f -> d next to one or two projections d -> f",
            found=sorted({type(layers[index].module).__name__ for index in without}),
        )
    return owner, layers


def candidate_layers(
    model: nn.Module, *, with_ffn: bool = True, do: str | None = None
) -> tuple[nn.Module, tuple[DecoderLayer, ...]]:
    """Return the decoder stack and its layers; `ffn` has every part with the shapes of an FFN.

    UnsupportedModelError, with the advice `do`, unless exactly one list of layers has such
    candidates. Without `with_ffn`, lists without candidates count as well.
    """
    lists = _outermost_lists(model)
    if with_ffn:
        lists = [found for found in lists if any(map(_candidates, found[2]))]
    chosen = lists if len(lists) == 1 else _of_the_decoder(model, lists)
    if len(chosen) != 1:
        raise UnsupportedModelError(
            f"the FFN sub-layers of {type(model).__name__} were not found",
            expected="one ModuleList of decoder layers, with FFNs of a projection f -> d next to "
            "one or two d -> f or a fused one d -> 2f, or experts in raw 3-d weights",
            found=[name for name, _, _ in lists or named_lists(model)] or "no ModuleList at all",
            do=do,
        )
    _, owner, modules = chosen[0]
    layers = []
    for module in modules:
        units = _candidates(module)
        layers.append(DecoderLayer(module, units, attention_of(module, preferred(units))))
    return owner, tuple(layers)


def preferred(units: tuple[Unit, ...]) -> tuple[Unit, ...]:
    """Return the candidates to use if a layer cannot be run.

    These are the candidates next to an activation; if there are none, the only candidate.
    """
    certain = tuple(u for u in units if isinstance(u, Experts) or u.activated)
    return certain or (units if len(units) == 1 else ())


def named_lists(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.ModuleList]]:
    """Yield (path, owner, list) of every ModuleList in a model."""
    for name, module in model.named_modules():
        for child_name, child in module.named_children():
            if isinstance(child, nn.ModuleList):
                yield f"{name}.{child_name}".lstrip("."), module, child


LayerList = tuple[str, nn.Module, list[nn.Module]]


def _outermost_lists(model: nn.Module) -> list[LayerList]:
    found = list(named_lists(model))
    nested = {id(inner) for _, _, outer in found for inner in outer.modules() if inner is not outer}
    return [(name, owner, list(items)) for name, owner, items in found if id(items) not in nested]


def _of_the_decoder(model: nn.Module, lists: list[LayerList]) -> list[LayerList]:
    """Return the lists that may be the text decoder of a model with several stacks."""
    count = _layer_count(model)
    by_count = [found for found in lists if len(found[2]) == count]
    if len(by_count) > 1:
        for module in model.modules():
            get_decoder: Any = getattr(module, "get_decoder", None)
            if get_decoder is not None and hasattr(module, "config"):
                inside = {id(owner) for owner in get_decoder().modules()}
                return [found for found in by_count if id(found[1]) in inside]
    return by_count


def _layer_count(model: nn.Module) -> int | None:
    for module in model.modules():
        text_config = getattr(getattr(module, "config", None), "get_text_config", None)
        if text_config is not None:
            return getattr(text_config(), "num_hidden_layers", None)
    return None


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield (name, child as the model calls it, child under PEFT's layers)."""
    for name, child in module.named_children():
        if not is_other(name):
            yield name, child, base_of(child)


def _activations(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's attributes that are activation functions."""
    modules = (
        name
        for name, child in module.named_children()
        if type(child).__module__ in _ACTIVATION_MODULES or _ACTIVATION.search(name)
    )
    functions = (
        name
        for name, value in vars(module).items()
        if _ACTIVATION.search(name) and callable(value) and not isinstance(value, str)
    )
    return (*modules, *functions)


def _candidates(layer: nn.Module) -> tuple[Unit, ...]:
    """Return every part of a decoder layer with the shapes of an FFN, in module order."""
    found: list[Unit] = []
    seen: set[int] = set()

    def visit(called: nn.Module, module: nn.Module) -> None:
        # A normalization may contain projections (A.X-K2's gated norm).
        if id(module) in seen or is_norm(module):
            return
        seen.add(id(module))
        unit: Unit | None = _experts(module)
        if unit is None and not _holds_other_weights(module):
            unit = _feed_forward(called, module, layer) or _split(called, module)
        if unit is not None:
            found.append(unit)
        for _, child, base in _children(module):
            visit(child, base)

    visit(layer, layer)
    return tuple(found)


def _holds_other_weights(module: nn.Module) -> bool:
    """Whether a module directly has weights that no FFN has: convolutions, raw matrices."""
    return any(isinstance(base, _ConvNd) for _, _, base in _children(module)) or any(
        weight.dim() > 1 for weight in module.parameters(recurse=False)
    )


Projection = tuple[nn.Module, tuple[int, int]]


def _projections(module: nn.Module) -> list[Projection]:
    sizes = ((child, projection_shape(base)) for _, child, base in _children(module))
    return [(child, size) for child, size in sizes if size is not None]


def _feed_forward(called: nn.Module, module: nn.Module, layer: nn.Module) -> FeedForward | None:
    """Match the direct children of a module against the shapes of an FFN."""
    projections = _projections(module)
    # If d == f every order matches; the down projection is the one registered last.
    for down, size in reversed(projections):
        rest = [projection for projection in projections if projection[0] is not down]
        if _are_inputs(rest, size):
            inputs = tuple(child for child, _ in rest)
            whole = called if called is not layer and _takes_only_x(called) else None
            return FeedForward(inputs, down, size[0], called, whole, bool(_activations(module)))
    return None


def _split(called: nn.Module, module: nn.Module) -> FeedForward | None:
    """Match an FFN in two modules: inputs and activation in one child, down next to it."""
    groups = [(base, _projections(base)) for _, _, base in _children(module)]
    direct = _projections(module)
    for base, inputs in groups:
        if not inputs or not _activations(base):
            continue
        others = [found[0] for other, found in groups if other is not base and len(found) == 1]
        for down, size in [*direct, *others]:
            if size[0] != size[1] and _are_inputs(inputs, size):
                parts = tuple(child for child, _ in inputs)
                return FeedForward(parts, down, size[0], called)
    return None


def _are_inputs(projections: list[Projection], down: tuple[int, int]) -> bool:
    f, d = down
    sizes = [size for _, size in projections]
    return sizes in ([(d, f)], [(d, f), (d, f)], [(d, 2 * f)])


def _takes_only_x(module: nn.Module) -> bool:
    """Whether the only required argument of a module is x."""
    parameters = inspect.signature(type(base_of(module)).forward).parameters.values()
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD,)
    ]
    return len(required) == 2  # self and x


def _experts(module: nn.Module) -> Experts | None:
    """Match the raw weights of a module against the shapes of experts."""
    gates = tuple(name for name in ("_apply_gate",) if hasattr(module, name))
    gates = (*gates, *_activations(module))
    weights = [w.shape for w in module.parameters(recurse=False) if w.dim() > 1]
    if not gates or len(weights) < 2:
        return None
    if all(len(shape) == 2 for shape in weights):  # DBRX: (experts * f, d), three times
        neurons = getattr(module, "ffn_hidden_size", 0)
        fits = neurons and len(set(weights)) == 1 and weights[0][0] % neurons == 0
        return Experts(module, gates, neurons) if fits else None
    matrices = [shape[1:] for shape in weights if len(shape) == 3]
    if len(matrices) < 2:
        return None
    *into, down = matrices
    for f, d in (down[::-1], down):
        if all(sorted(size) in (sorted((d, f)), sorted((d, 2 * f))) for size in into):
            return Experts(module, gates, f)
    return None


def attention_of(
    layer: nn.Module, ffn: tuple[Unit, ...], called: Container[int] | None = None
) -> Attention | None:
    """Return the only child of a layer with projections that is not an FFN; None if ambiguous.

    `called` are the ids of modules that a forward pass calls, if known; other children are
    ignored.
    """
    ffn_modules = {id(module) for unit in ffn for module in unit.modules}
    candidates = []
    for _, child, base in _children(layer):
        inside = list(base.modules())
        if (
            any(id(module) in ffn_modules for module in inside)
            or projection_shape(base) is not None
        ):
            continue
        if is_norm(base) or (called is not None and id(child) not in called):
            continue
        if projections := (_named_projections(base) or _nested_projections(base)):
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


NamedProjection = tuple[str, nn.Module, tuple[int, int]]


def _named_projections(module: nn.Module) -> list[NamedProjection]:
    sizes = ((name, child, projection_shape(base)) for name, child, base in _children(module))
    return [(name, child, size) for name, child, size in sizes if size is not None]


def _nested_projections(module: nn.Module) -> list[NamedProjection]:
    return [found for child in module.children() for found in _named_projections(base_of(child))]


def _shape_of_down(unit: Unit) -> tuple[int, int] | None:
    return projection_shape(unit.down) if isinstance(unit, FeedForward) else None
