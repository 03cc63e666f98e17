"""Which layers of a model are alike, so that one of them can stand for all."""

import re
from collections.abc import Hashable
from typing import Any

from torch import nn

__all__ = ["kind_of"]

_POSITIONS = re.compile(r"(^|_)(idx|index|id|number|num)$")


def kind_of(layer: nn.Module) -> Hashable:
    """Return a value that is the same for layers that compute the same but for their weights.

    It covers classes, names, shapes and dtypes of weights, and plain attributes, in which two
    layers may differ beside their weights (activations, sparsity). The position of the layer is
    left out.
    """
    return tuple((name, type(module), *_of(module)) for name, module in layer.named_modules())


def _of(module: nn.Module) -> tuple[Hashable, ...]:
    tensors = (
        (name, tuple(tensor.shape), tensor.dtype, type(tensor))
        for named in (module._parameters, module._buffers)
        for name, tensor in named.items()
        if tensor is not None
    )
    attributes = (
        (name, plain)
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and not _POSITIONS.search(name)
        for plain in [_plain(value)]
        if plain is not None
    )
    return (*tensors, *attributes)


def _plain(value: Any) -> Hashable:
    if isinstance(value, str | bool | int | float):
        return (type(value).__name__, value)
    if isinstance(value, list | tuple | set):
        return tuple(_plain(item) for item in value)
    if isinstance(value, dict):
        return tuple((str(key), _plain(item)) for key, item in value.items())
    if callable(value) and not isinstance(value, nn.Module):
        return getattr(value, "__qualname__", type(value).__name__)
    return None
