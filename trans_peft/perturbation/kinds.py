"""Group equivalent layers of a model, so that only one of each group is verified."""

import re
from collections.abc import Hashable
from typing import Any

from torch import nn

__all__ = ["kind_of"]

_POSITIONS = re.compile(r"(^|_)(idx|index|id|number|num)$")


def kind_of(layer: nn.Module) -> Hashable:
    """Return a value that is equal for layers that differ in the values of their weights only.

    It covers classes, and names, shapes and dtypes of weights, and plain attributes (activations,
    sparsity), except for the position of the layer.
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
