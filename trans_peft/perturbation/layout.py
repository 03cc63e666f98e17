"""Name the sub-layers of a model whose FFNs cannot be found by shape."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from trans_peft.errors import UnsupportedModelError
from trans_peft.perturbation.ffn import named_lists
from trans_peft.perturbation.units import (
    Attention,
    DecoderLayer,
    FeedForward,
    base_of,
    projection_shape,
)

__all__ = ["Layout", "layers_by_name", "layouts_by_shape"]


@dataclass(frozen=True)
class Layout:
    """The names of the sub-layers of a model.

    Attributes:
        layers: path of the ModuleList of decoder layers.
        ffn_inputs: paths, inside a layer, of the projections d -> f.
        ffn_down: path, inside a layer, of the projection f -> d.
        attention: path, inside a layer, of the attention.
        attention_output: path, inside a layer, of the attention's projection to the hidden size.

    Example:
        Layout("transformer.blocks", ffn_inputs=("ffn.w1", "ffn.w3"), ffn_down="ffn.w2")
    """

    layers: str
    ffn_inputs: tuple[str, ...]
    ffn_down: str
    attention: str | None = None
    attention_output: str | None = None

    def __str__(self) -> str:
        return f"Layout({self.layers!r}, ffn_inputs={self.ffn_inputs}, ffn_down={self.ffn_down!r})"


def layouts_by_shape(model: nn.Module) -> Iterator[Layout]:
    """Yield possible layouts: in each list, a projection f -> d next to projections d -> f."""
    for path, _, layers in named_lists(model):
        for name, module in layers[0].named_modules() if len(layers) else ():
            sizes = {
                f"{name}.{child_name}".lstrip("."): size
                for child_name, child in module.named_children()
                if (size := projection_shape(child)) is not None
            }
            # The down projection is registered last.
            for down, (f, d) in reversed(sizes.items()):
                inputs = {other: size for other, size in sizes.items() if other != down}
                if inputs and set(inputs.values()) == {(d, f)}:
                    yield Layout(path, tuple(inputs), down)


def layers_by_name(model: nn.Module, layout: Layout) -> tuple[nn.Module, tuple[DecoderLayer, ...]]:
    """Return the decoder stack and its layers by name. UnsupportedModelError if one is missing."""
    # PEFT and data parallelism add prefixes to the names.
    matches = [
        (owner, layers)
        for name, owner, layers in named_lists(model)
        if f".{name}".endswith(f".{layout.layers}")
    ]
    if len(matches) != 1:
        raise UnsupportedModelError(
            f"{layout.layers!r} is not the path of one ModuleList of {type(model).__name__}",
            expected="the path of the ModuleList of decoder layers",
            found=[name for name, _, _ in named_lists(model)],
        )
    owner, layers = matches[0]
    return owner, tuple(_layer(index, layer, layout) for index, layer in enumerate(layers))


def _layer(index: int, layer: nn.Module, layout: Layout) -> DecoderLayer:
    problems: list[str] = []

    def get(path: str) -> tuple[nn.Module, tuple[int, int]]:
        module: nn.Module | None = layer
        for name in path.split("."):
            module = getattr(base_of(module), name, None) if module is not None else None
        size = None if module is None else projection_shape(module)
        if module is None or (size is None and path != layout.attention):
            problems.append(
                f"layer {index} has no {'module' if module is None else 'projection'} {path}"
            )
        return module or layer, size or (0, 0)

    inputs = tuple(get(path)[0] for path in layout.ffn_inputs)
    down, (neurons, _) = get(layout.ffn_down)
    attention = None
    if layout.attention is not None and layout.attention_output is not None:
        output, (width, _) = get(layout.attention_output)
        attention = Attention(get(layout.attention)[0], output, width)
    if problems:
        raise UnsupportedModelError(
            f"the layout does not match the model: {'; '.join(problems)}",
            found=[name for name, _ in layer.named_modules() if name],
        )
    unit = FeedForward(inputs, down, neurons, _common(layer, [*layout.ffn_inputs, layout.ffn_down]))
    return DecoderLayer(layer, (unit,), attention)


def _common(layer: nn.Module, paths: list[str]) -> nn.Module:
    """Return the smallest module that contains all of these paths, at most the layer."""
    module = layer
    for names in zip(*(path.split(".")[:-1] for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        module = getattr(base_of(module), names[0])
    return module
