"""Decide which candidates of a layer are FFNs, and find weights that no FFN accounts for."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from trans_peft.perturbation.behavior import (
    Behavior,
    Call,
    floats_of,
    record_calls,
    rows_of,
)
from trans_peft.perturbation.ffn import is_norm, is_other
from trans_peft.perturbation.mask_site import override
from trans_peft.perturbation.units import Experts, FeedForward, Unit, base_of, projection_shape
from trans_peft.rounding import difference_beyond_rounding

__all__ = ["LayerAnalysis", "unassigned_by_shape"]


class LayerAnalysis:
    """Analysis of one layer, from running it on one recorded input."""

    def __init__(self, layer: nn.Module, call: Call, candidates: tuple[Unit, ...]) -> None:
        self.layer = layer
        self.call = call
        self.candidates = candidates
        x = next(floats_of((call.args, call.kwargs)), None)
        self.hidden = 0 if x is None else x.shape[-1]
        self._names = {id(module): name for name, module in layer.named_modules()}
        self._seen: dict[int, Behavior | None] = {}
        self._used: set[int] = set()

    @cached_property
    def calls(self) -> dict[int, Call]:
        """The first call of each module below the layer."""
        inside = [module for module in self.layer.modules() if module is not self.layer]
        with ExitStack() as undo:
            calls = record_calls(inside, undo)
            self._used = undo.enter_context(_UsedWeights(self.layer)).used
            self.call.again()
        return calls

    def bypassed(self) -> list[str]:
        """Return the names of projections whose weights are used while they are not called.

        Masks act where a projection is called. Fused kernels and functional code read the weights
        instead, so that a mask would have no effect.
        """
        parts = {id(part): part for unit in self.candidates for part in unit.modules}
        return [self._names[key] for key, part in parts.items() if self._is_bypassed(part)]

    def _is_bypassed(self, module: nn.Module) -> bool:
        uncalled = id(module) not in self.calls
        return uncalled and any(id(weight) in self._used for weight in module.parameters())

    def rejection_reason(self, unit: Unit) -> str | None:
        """Return why a candidate is not an FFN; None if it is one."""
        if isinstance(unit, Experts):
            return None
        around = self._called_around(unit)
        if around is None:
            return self._inline_rejection_reason(unit)
        seen = self.behavior(around)
        if seen is None:
            return "it cannot be run on its own"
        if seen.keeps_rows and seen.mixes_tokens:
            return "it mixes tokens"
        if seen.keeps_rows and not seen.is_self_contained:
            return "it depends on more than its input"
        if seen.keeps_rows and seen.is_linear:
            return "it is linear"
        return None

    def behavior(self, module: nn.Module) -> Behavior | None:
        """Return the behavior of a called module; None if it cannot be run on its own."""
        if id(module) not in self._seen:
            try:
                seen = Behavior.of(self.calls[id(module)], self.hidden)
            except Exception:  # a module may raise any error on a changed input
                seen = None
            self._seen[id(module)] = seen
        return self._seen[id(module)]

    def unassigned(self, units: tuple[Unit, ...]) -> list[str]:
        """Return the names of weights that may belong to an FFN but are in none of `units`."""
        assigned = {id(base_of(part)) for unit in units for part in unit.modules}
        found: list[str] = []
        linear: list[tuple[str, nn.Module]] = []
        for name, module in self._rest(self.layer, "", assigned):
            if isinstance(module, nn.Parameter):
                if self.hidden in module.shape and sum(n > 1 for n in module.shape) > 1:
                    found.append(name)
            elif id(module) not in self.calls:
                linear += self._bypassed_below(name, module)
            elif projection_shape(module) is not None:
                linear.append((name, module))
            elif (seen := self.behavior(module)) is None or seen.is_per_token:
                if seen is None or not seen.is_linear or isinstance(module, nn.Embedding):
                    found.append(name)
            elif seen.keeps_rows:
                found += self._hidden_in(name, module)
        return found + _pairs(linear, self.hidden)

    def _bypassed_below(self, name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for path, part in module.named_modules():
            if projection_shape(part) is not None and self._is_bypassed(part):
                yield f"{name}.{path}".rstrip("."), part

    def unassigned_in_layout(self, units: tuple[Unit, ...]) -> list[str]:
        """Return the names of weights that may belong to a layout's units but are not in them."""
        names = []
        for unit in units:
            if isinstance(unit, FeedForward) and unit.container is not self.layer:
                path = self._names[id(unit.container)]
                names += [name for name in self.unassigned(units) if name.startswith(f"{path}.")]
                if (reason := self._inline_rejection_reason(unit)) is not None:
                    names.append(f"{path} ({reason})")
        return names

    def _hidden_in(self, name: str, mixer: nn.Module) -> Iterator[str]:
        """Yield the parts of a token-mixing module that map each token nonlinearly."""
        adapters = {
            id(part)
            for tuner in mixer.modules()
            if isinstance(tuner, BaseTunerLayer)
            for part in set(tuner.modules()) - set(base_of(tuner).modules())
        }
        for path, module in mixer.named_modules():
            weights = sum(p.dim() > 1 for p in module.parameters())
            if module is mixer or weights < 2 or id(module) not in self.calls:
                continue
            if id(module) in adapters or projection_shape(module) is not None:
                continue
            seen = self.behavior(module)
            if seen and seen.is_per_token and seen.depends_on_input and not seen.is_linear:
                yield f"{name}.{path}"

    def _rest(
        self, module: nn.Module, prefix: str, assigned: set[int]
    ) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
        """Yield raw weights, and the largest modules with weights but without an assigned part."""
        base = base_of(module)
        for name, weight in base.named_parameters(recurse=False):
            if weight.dim() > 1:
                yield prefix + name, weight
        for name, child in base.named_children():
            if is_other(name) or is_norm(child):
                continue
            inside = {id(part) for part in child.modules()}
            if not any(parameter.dim() > 1 for parameter in child.parameters()):
                continue
            if id(base_of(child)) in assigned:
                continue
            if inside & assigned or isinstance(child, nn.ModuleList | nn.ModuleDict):
                yield from self._rest(child, f"{prefix}{name}.", assigned)
            else:
                yield prefix + name, child

    def _called_around(self, unit: FeedForward) -> nn.Module | None:
        """Return the smallest called module around a unit; None if that is the layer."""
        path = self._names.get(id(unit.container), "")
        while path:
            module = self.layer.get_submodule(path)
            if id(module) in self.calls:
                return module
            path = path.rpartition(".")[0]
        return None

    def _inline_rejection_reason(self, unit: FeedForward) -> str | None:
        """Return why a unit without its own module is not an FFN: its neurons need other inputs."""
        if id(unit.down) not in self.calls:
            return "its down projection is not called"
        with ExitStack() as undo:
            for projection in unit.inputs:
                _repeat_first_row(projection, undo)
            calls = record_calls([unit.down], undo)
            self.call.again()
        neurons = next(floats_of((calls[id(unit.down)].args, calls[id(unit.down)].kwargs)))
        rows = rows_of(neurons)
        if difference_beyond_rounding(rows, rows[:1].expand_as(rows)) is not None:
            return "its neurons depend on other values than its projections"
        return None


class _UsedWeights(TorchFunctionMode):
    """Collects the ids of a module's matrices that any function of torch is given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._weights = {id(weight) for weight in module.parameters() if weight.dim() > 1}
        self.used: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # reading a dtype or a shape is no use
            self.used |= self._weights & {id(leaf) for leaf in tree_leaves((args, kwargs))}
        return func(*args, **(kwargs or {}))


def unassigned_by_shape(layer: nn.Module, units: tuple[Unit, ...]) -> list[str]:
    """Return the names of weights that may belong to an FFN, in a layer that cannot be run.

    These are raw weights of three dimensions, and projections that lie next to a unit's projection
    and have its shape.
    """
    assigned = {id(base_of(part)) for unit in units for part in unit.modules}
    input_shapes = {
        (id(base_of(unit.container)), projection_shape(part))
        for unit in units
        if isinstance(unit, FeedForward)
        for part in unit.inputs
    }
    found = []
    for name, module in layer.named_modules():
        if id(module) in assigned or is_other(name.rpartition(".")[2]):
            continue
        raw = [n for n, p in module.named_parameters(recurse=False) if p.dim() == 3]
        if projection_shape(module) is None and not isinstance(module, nn.Conv1d):
            found += [f"{name}.{n}".lstrip(".") for n in raw]
        for child_name, child in module.named_children():
            unknown = id(base_of(child)) not in assigned and projection_shape(child) is not None
            if unknown and (id(module), projection_shape(child)) in input_shapes:
                found.append(f"{name}.{child_name}".lstrip("."))
    return found


def _repeat_first_row(projection: nn.Module, undo: ExitStack) -> None:
    """Make a projection return the result of the first row (token) for every row."""
    original = projection.forward

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = original(*args, **kwargs)
        return rows_of(result)[:1].expand_as(rows_of(result)).reshape(result.shape)

    override(projection, forward, undo)


def _pairs(linear: list[tuple[str, nn.Module]], hidden: int) -> list[str]:
    """Return the names of projections whose shapes pair up as those of an FFN do.

    Two such projections may be an FFN whose activation is in the layer's code. A single projection
    has no neurons.
    """
    shapes = [(name, projection_shape(module)) for name, module in linear]
    found = [
        name
        for number, (name, shape) in enumerate(shapes)
        for other, (_, second) in enumerate(shapes)
        if other != number and shape is not None and second is not None
        if shape == second[::-1] and hidden in shape
    ]
    return list(dict.fromkeys(found))
