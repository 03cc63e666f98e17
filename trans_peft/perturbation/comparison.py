"""Mask and drop the units of one layer on one input, and compare the implementations."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from trans_peft.domain.recipe import Perturbation
from trans_peft.errors import UnsupportedModelError
from trans_peft.perturbation.behavior import Call, floats_of, record_calls, rows_of
from trans_peft.perturbation.dropping import drop_attention, drop_ffn
from trans_peft.perturbation.mask_site import override
from trans_peft.perturbation.masking import mask_ffn
from trans_peft.perturbation.slicing import NeuronSelection, neurons_to_compute, reason_not_sliced
from trans_peft.perturbation.units import DecoderLayer, Experts, FeedForward, Unit
from trans_peft.rounding import difference_beyond_rounding

__all__ = ["dropped", "masked", "reason_attention_not_dropped"]


@dataclass(frozen=True, eq=False)
class _Masks:
    """Fixed masks instead of drawn ones: `kept_neurons` (neurons,) bool of each unit."""

    kept_neurons: tuple[np.ndarray, ...]
    perturbation: Perturbation = field(default=Perturbation(masking_p=0.5))
    active: bool = True

    def kept(self, unit: int, parts: int, device: torch.device) -> NeuronSelection | None:
        return neurons_to_compute(self.kept_neurons[unit], parts, device)

    def masked(self, unit: int, x: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(torch.from_numpy(~self.kept_neurons[unit]).to(x.device), 0)


class _Dropped:
    dropped = True


def masked(layer: DecoderLayer, call: Call) -> tuple[Unit, ...]:
    """Return the units of a layer; `multiplied` has the reason if a unit cannot be sliced.

    UnsupportedModelError if a unit cannot be masked at all.
    """
    units = layer.ffn
    masks = [_Masks(tuple(_half(unit.neurons, seed) for unit in units)) for seed in (1,)]
    masks.append(_Masks(tuple(_all_but_one(unit.neurons) for unit in units)))
    multiplied = tuple(
        replace(u, multiplied="to be compared") if isinstance(u, FeedForward) else u for u in units
    )
    _check_experts(multiplied, call)
    expected = [_outputs(mask, multiplied, call) for mask in masks]
    result = []
    for number, unit in enumerate(units):
        if isinstance(unit, FeedForward) and _can_be_sliced(unit):
            trial = (*multiplied[:number], unit, *multiplied[number + 1 :])
            reason = next(
                (
                    reason
                    for mask, outputs in zip(masks, expected, strict=True)
                    if (reason := _slicing_problem(mask, trial, number, outputs[number], call))
                ),
                None,
            )
            unit = replace(unit, multiplied=reason)
        result.append(unit)
    return tuple(result)


def _half(neurons: int, seed: int) -> np.ndarray:
    kept_neurons = np.zeros(neurons, dtype=bool)
    kept_neurons[
        np.random.Generator(np.random.Philox(seed)).permutation(neurons)[: neurons // 2]
    ] = True
    return kept_neurons


def _all_but_one(neurons: int) -> np.ndarray:
    return np.arange(neurons) != neurons // 3


def _can_be_sliced(unit: FeedForward) -> bool:
    return all(reason_not_sliced(part) is None for part in unit.modules)


def _slicing_problem(
    mask: _Masks, trial: tuple[Unit, ...], number: int, expected: list[torch.Tensor], call: Call
) -> str | None:
    try:
        found = _outputs(mask, trial, call)[number]
    except Exception as error:  # code between the projections may raise any error
        return f"it raises {type(error).__name__} with some of its neurons: {error}"
    if len(found) != len(expected):
        return "its number of calls differs if it is sliced"
    distances = [difference_beyond_rounding(a, b) for a, b in zip(found, expected, strict=True)]
    worst = max((distance for distance in distances if distance is not None), default=None)
    if worst is None:
        return None
    return f"the sliced result differs from the multiplied one by {worst:.0%}"


def _outputs(mask: _Masks, units: tuple[Unit, ...], call: Call) -> list[list[torch.Tensor]]:
    """Return the outputs of the last module of each unit under a mask, by call."""
    outputs: list[list[torch.Tensor]] = [[] for _ in units]
    with ExitStack() as undo:
        mask_ffn(mask, units, undo)
        for unit, into in zip(units, outputs, strict=True):
            _record(unit.module if isinstance(unit, Experts) else unit.down, into, undo)
        call.again()
    return outputs


def _record(module: nn.Module, into: list[torch.Tensor], undo: ExitStack) -> None:
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        into.extend(x.clone() for x in _first(result))
        return result

    override(module, forward, undo)


def _first(result: Any) -> Iterator[torch.Tensor]:
    for x in floats_of(result):
        yield x
        return


def _check_experts(units: tuple[Unit, ...], call: Call) -> None:
    """Raise UnsupportedModelError if masking all neurons of experts leaves a contribution.

    The result must equal that of a down projection of zeros. Otherwise the down projection is
    multiplied by more than the gates return.
    """
    for number, unit in enumerate(units):
        if not isinstance(unit, Experts):
            continue
        mask = _Masks(tuple(np.full(u.neurons, u is not unit) for u in units))
        masked = _outputs(mask, units, call)[number]
        weights = {n: w for n, w in _raw(unit.module) if "bias" not in n and w.dim() > 1}
        name, weight = list(weights.items())[-1]  # the down projection is registered last
        # An expanded zero takes no memory.
        zeros = weight.new_zeros([1] * weight.dim()).expand(weight.shape)
        unit.module._parameters[name] = zeros  # type: ignore[assignment]
        try:
            without: list[torch.Tensor] = []
            with ExitStack() as undo:
                _record(unit.module, without, undo)
                call.again()
        except Exception:  # noqa: S112  a kernel that rejects an expanded weight
            continue
        finally:
            unit.module._parameters[name] = weight
        if any(
            difference_beyond_rounding(x, y) is not None
            for x, y in zip(masked, without, strict=True)
        ):
            raise UnsupportedModelError(
                f"masking the results of {' and '.join(unit.gates)} does not mask all neurons of "
                f"{type(unit.module).__name__}"
            )


def _raw(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, w) for name, w in module._parameters.items() if w is not None)


def dropped(layer: DecoderLayer, call: Call) -> DecoderLayer:
    """Return the layer with the fastest correct way to drop its FFN.

    A dropped FFN must add nothing to the residual stream. `biased` of the result are the modules
    that would add a constant, such as a bias of the mixture or of a norm after it. A module that
    adds the residual is not among them.
    """
    plain = replace(layer, ffn=tuple(map(_computed, layer.ffn)), biased=())
    parts = {id(m) for unit in layer.ffn for part in unit.modules for m in part.modules()}
    around = [m for m in layer.module.modules() if m is not layer.module and id(m) not in parts]
    with ExitStack() as undo:
        undropped = record_calls(around, undo)
        call.again()
    with ExitStack() as undo:
        drop_ffn(_Dropped(), plain, undo)
        calls = record_calls(around, undo)
        outputs: dict[int, list[torch.Tensor]] = {id(module): [] for module in around}
        for module in around:
            _record(module, outputs[id(module)], undo)
        call.again()

    def adds_a_constant(module: nn.Module) -> bool:
        found = outputs[id(module)]
        if not found or not all(map(_is_constant, found)) or not any(x.any() for x in found):
            return False
        before, after = (
            next(floats_of((c[id(module)].args, c[id(module)].kwargs)), None)
            for c in (undropped, calls)
        )
        follows = before is not None and after is not None and before.any() and not after.any()
        return follows or any(id(inner) in parts for inner in module.modules())

    biased = [module for module in around if adds_a_constant(module)]
    inner = {id(m) for module in biased for m in module.modules() if m is not module}
    plain = replace(plain, biased=tuple(m for m in biased if id(m) not in inner))
    expected = _layer_output(plain, call)
    units = tuple(
        replace(u, whole=u.whole if _constant(outputs.get(id(u.whole))) else None)
        if isinstance(u, FeedForward)
        else u
        for u in layer.ffn
    )
    for trial in (units, tuple(map(_without_whole, units))):
        faster = replace(plain, ffn=trial)
        try:
            found = _layer_output(faster, call)
        except Exception:  # noqa: S112  a width of zero may raise any error; try the slower way
            continue
        if difference_beyond_rounding(found, expected) is None:
            return faster
    return plain


def _computed(unit: Unit) -> Unit:
    """Return a unit whose dropping still computes it up to its down projection."""
    return replace(unit, whole=None, narrows=False) if isinstance(unit, FeedForward) else unit


def _without_whole(unit: Unit) -> Unit:
    return replace(unit, whole=None) if isinstance(unit, FeedForward) else unit


def _is_constant(x: torch.Tensor) -> bool:
    rows = rows_of(x)
    return bool(torch.equal(rows, rows[:1].expand_as(rows)))


def _constant(outputs: list[torch.Tensor] | None) -> bool:
    return bool(outputs) and all(map(_is_constant, outputs or ()))


def _layer_output(layer: DecoderLayer, call: Call) -> torch.Tensor:
    with ExitStack() as undo:
        drop_ffn(_Dropped(), layer, undo)
        return next(floats_of(call.again()))


def reason_attention_not_dropped(layer: DecoderLayer, call: Call) -> str | None:
    """Return why a dropped attention would still contribute; None if it does not."""
    if layer.attention is None:
        return "it was not found"
    outputs: list[torch.Tensor] = []
    with ExitStack() as undo:
        drop_attention(_Dropped(), layer, undo)
        _record(layer.attention.module, outputs, undo)
        call.again()
    if not outputs:
        return f"{type(layer.attention.module).__name__} is not called"
    if any(x.any() for x in outputs) and all(map(_is_constant, outputs)):
        return (
            f"{type(layer.attention.module).__name__} adds a constant after its output projection"
        )
    return None
