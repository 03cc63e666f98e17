"""Group equivalent layers of a model, so that only one of each group is verified."""

import functools
import re
from collections.abc import Hashable
from typing import Any

from torch import nn

__all__ = ["kind_of"]

_POSITIONS = re.compile(r"(^|_)(idx|index|id|number|num)$")
_OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that every module has: its tensors, children and hooks."""


def kind_of(layer: nn.Module) -> Hashable:
    """Return a value that is equal for layers that differ in the values of their weights only.

    It covers classes, the names, shapes and dtypes of weights, and attributes in which two layers
    may differ beside their weights (activations, sparsity, a `forward` of their own). It leaves out
    the position of the layer.
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
        if name not in _OF_TORCH and not _POSITIONS.search(name)
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
    if isinstance(value, functools.partial):
        return (_plain(value.func), _plain(value.args), _plain(value.keywords))
    if callable(value) and not isinstance(value, nn.Module):
        # Two functions may share a name; functions made by one definition share their code.
        function = getattr(value, "__func__", value)
        name = getattr(function, "__qualname__", type(value).__name__)
        return (name, getattr(function, "__code__", None))
    return None
