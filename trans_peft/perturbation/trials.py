"""Mask and drop the units of one layer on the same input, and compare the results."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from trans_peft.domain.recipe import Perturbation
from trans_peft.errors import UnsupportedModelError
from trans_peft.perturbation.behaviour import Call, differs, floats_of, record_calls, rows_of
from trans_peft.perturbation.dropping import drop_attention, drop_ffn
from trans_peft.perturbation.mask_site import override
from trans_peft.perturbation.masking import mask_ffn
from trans_peft.perturbation.slicing import NeuronSelection, neurons_to_compute, reason_not_sliced
from trans_peft.perturbation.units import DecoderLayer, Experts, FeedForward, Unit

__all__ = ["dropped", "masked", "why_attention_stays"]


@dataclass(frozen=True, eq=False)
class _Masks:
    """Given masks in place of drawn ones: `stays` (neurons,) bool of each unit."""

    stays: tuple[np.ndarray, ...]
    perturbation: Perturbation = field(default=Perturbation(masking_p=0.5))
    active: bool = True

    def kept(self, unit: int, parts: int, device: torch.device) -> NeuronSelection | None:
        return neurons_to_compute(self.stays[unit], parts, device)

    def masked(self, unit: int, x: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(torch.from_numpy(~self.stays[unit]).to(x.device), 0)


class _Dropped:
    dropped = True


def masked(layer: DecoderLayer, call: Call) -> tuple[Unit, ...]:
    """Return the units of a layer, with a reason where their neurons are to be multiplied.

    UnsupportedModelError where a unit cannot be masked in any way.
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
                    if (reason := _why_unequal(mask, trial, number, outputs[number], call))
                ),
                None,
            )
            unit = replace(unit, multiplied=reason)
        result.append(unit)
    return tuple(result)


def _half(neurons: int, seed: int) -> np.ndarray:
    stays = np.zeros(neurons, dtype=bool)
    stays[np.random.Generator(np.random.Philox(seed)).permutation(neurons)[: neurons // 2]] = True
    return stays


def _all_but_one(neurons: int) -> np.ndarray:
    return np.arange(neurons) != neurons // 3


def _can_be_sliced(unit: FeedForward) -> bool:
    return all(reason_not_sliced(part) is None for part in unit.modules)


def _why_unequal(
    mask: _Masks, trial: tuple[Unit, ...], number: int, expected: list[torch.Tensor], call: Call
) -> str | None:
    try:
        found = _outputs(mask, trial, call)[number]
    except Exception as error:  # whatever the code between the projections raises
        return f"on some of its neurons it raises {type(error).__name__}: {error}"
    if len(found) != len(expected):
        return "sliced, it is called another number of times"
    distances = [differs(a, b) for a, b in zip(found, expected, strict=True)]
    worst = max((distance for distance in distances if distance is not None), default=None)
    if worst is None:
        return None
    return f"the sliced result is {worst:.0%} off the multiplied one"


def _outputs(mask: _Masks, units: tuple[Unit, ...], call: Call) -> list[list[torch.Tensor]]:
    """Return what the last module of each unit returned in one run under a mask, call by call."""
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
    """Masking all neurons of experts must give what a down projection of zeros gives.

    Otherwise what the gates return is not all that the down projection is multiplied with.
    """
    for number, unit in enumerate(units):
        if not isinstance(unit, Experts):
            continue
        mask = _Masks(tuple(np.full(u.neurons, u is not unit) for u in units))
        masked = _outputs(mask, units, call)[number]
        weights = {n: w for n, w in _raw(unit.module) if "bias" not in n and w.dim() > 1}
        name, weight = list(weights.items())[-1]  # the down projection is registered last
        # One zero, expanded: it takes no memory.
        zeros = weight.new_zeros([1] * weight.dim()).expand(weight.shape)
        unit.module._parameters[name] = zeros  # type: ignore[assignment]
        try:
            without: list[torch.Tensor] = []
            with ExitStack() as undo:
                _record(unit.module, without, undo)
                call.again()
        except Exception:  # noqa: S112  a kernel that takes no such weight
            continue
        finally:
            unit.module._parameters[name] = weight
        if any(differs(x, y) is not None for x, y in zip(masked, without, strict=True)):
            raise UnsupportedModelError(
                f"masking all that {' and '.join(unit.gates)} of {type(unit.module).__name__} "
                "return does not mask all of its neurons"
            )


def _raw(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, w) for name, w in module._parameters.items() if w is not None)


def dropped(layer: DecoderLayer, call: Call) -> DecoderLayer:
    """Return the layer with the ways in which its dropped FFN is left out.

    The FFN must add nothing to the residual stream: `biased` are the modules that turn a dropped
    FFN into a constant, such as a bias of the mixture or of a norm after it. A module that adds the
    residual itself is no constant, and is left alone.
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
        except Exception:  # noqa: S112  whatever a width of zero raises; the next computes more
            continue
        if found.shape == expected.shape and differs(found, expected) is None:
            return faster
    return plain


def _computed(unit: Unit) -> Unit:
    """Return a unit that is computed where it is dropped, up to its down projection."""
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


def why_attention_stays(layer: DecoderLayer, call: Call) -> str | None:
    """Return what is left of an attention that is dropped, None where nothing is."""
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
        return f"{type(layer.attention.module).__name__} adds a constant to its output projection"
    return None
