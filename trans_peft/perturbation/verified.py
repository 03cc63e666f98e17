"""Find the FFNs of a model, and verify them on one layer of each kind.

Candidates are found by shape (`ffn`). The model runs once on a few tokens. Then the first layer of
each kind runs again on its recorded input:

-   the behavior of a candidate shows whether it is an FFN (`layer_analysis`);
-   a weight that may belong to an FFN but is in no unit makes the model unsupported, by name;
-   a unit is sliced only if the sliced result equals the multiplied one under two masks;
-   a dropped FFN must add nothing (`comparison`).
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

import torch
from torch import nn

from trans_peft.errors import UnsupportedModelError
from trans_peft.perturbation.behavior import Call, record_calls
from trans_peft.perturbation.comparison import dropped, masked, reason_attention_not_dropped
from trans_peft.perturbation.draws import SubLayerKind
from trans_peft.perturbation.ffn import attention_of, candidate_layers, preferred
from trans_peft.perturbation.kinds import kind_of
from trans_peft.perturbation.layer_analysis import LayerAnalysis, unassigned_by_shape
from trans_peft.perturbation.layout import Layout, layers_by_name, layouts_by_shape
from trans_peft.perturbation.side_effects import run_on_tokens, without_side_effects
from trans_peft.perturbation.units import DecoderLayer, FeedForward, Unit, base_of

__all__ = ["found_layers", "verified_layers"]


def found_layers(
    model: nn.Module, layout: Layout | None, kinds: Sequence[SubLayerKind] = ("ffn",)
) -> tuple[nn.Module, tuple[DecoderLayer, ...]]:
    """Return the decoder stack of a model and its layers, with candidates for FFNs.

    UnsupportedModelError if they are not found. It suggests a layout only if that layout works.
    """
    if layout is not None:
        return layers_by_name(model, layout)
    try:
        return candidate_layers(model, with_ffn="ffn" in kinds)
    except UnsupportedModelError:
        candidate_layers(model, with_ffn="ffn" in kinds, do=_workaround(model, kinds))
        raise


def verified_layers(
    model: nn.Module,
    stack: nn.Module,
    layers: Sequence[DecoderLayer],
    *,
    kinds: Sequence[SubLayerKind] = ("ffn",),
    stated: bool = False,
) -> tuple[DecoderLayer, ...]:
    """Return the layers with the units that can be masked and dropped.

    `kinds` are the sub-layers that must be found. `stated`: a layout named the layers. Layers
    without an FFN are allowed if at least one layer has one. If the model cannot run on token ids,
    only shapes are used, and masked neurons are multiplied by zero. The model and all random states
    are unchanged afterwards. UnsupportedModelError lists every reason against perturbing the model.
    """
    if problems := [*_shared(layers), *_scripted(layers)]:
        raise _refused(model, problems, "train without masking and dropping: Perturbation()")
    alike: dict[Hashable, list[int]] = {}
    for index, layer in enumerate(layers):
        alike.setdefault(kind_of(layer.module), []).append(index)
    found = list(layers)
    with without_side_effects(model):
        firsts = [layers[indices[0]] for indices in alike.values()]
        with ExitStack() as undo:
            calls = record_calls([first.module for first in firsts], undo)
            failure = run_on_tokens(model, stack)
        for indices, first in zip(alike.values(), firsts, strict=True):
            verified = _verified_layer(first, calls.get(id(first.module)), failure, stated=stated)
            where = f"layer{'s' if len(indices) > 1 else ''} {_ranges(indices)}"
            where = f"{where} ({type(first.module).__name__})"
            if "ffn" in kinds:
                problems += [f"{where}: {problem}" for problem in verified.ffn]
            if "attention" in kinds and verified.attention_problem:
                problems.append(f"{where}: attention: {verified.attention_problem}")
            for index in indices:
                found[index] = _like_first(first, verified.layer, layers[index])
    if "ffn" in kinds and not problems and not any(layer.ffn for layer in found):
        problems.append("no layer has an FFN: no module maps each token separately and nonlinearly")
    if problems:
        raise _refused(model, problems, None if stated else _workaround(model, kinds))
    return tuple(found)


def _refused(model: nn.Module, problems: list[str], do: str | None) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} cannot be perturbed:\n    " + "\n    ".join(problems),
        expected="every weight of an FFN is found, and no other weight is mistaken for one",
        do=do,
    )


def _shared(layers: Sequence[DecoderLayer]) -> Iterator[str]:
    """Yield the modules that belong to two layers, which would get the masks of both."""
    owners: dict[int, tuple[int, str]] = {}
    for index, layer in enumerate(layers):
        names = {id(module): name for name, module in layer.module.named_modules()}
        parts = [part for unit in layer.ffn for part in unit.modules]
        parts += [layer.attention.output] if layer.attention else []
        for part in {id(base_of(part)): part for part in parts}.values():
            first, name = owners.setdefault(id(base_of(part)), (index, names.get(id(part), "")))
            if first != index:
                yield f"layers {first} and {index} share {name}, and each has masks of its own"


def _scripted(layers: Sequence[DecoderLayer]) -> Iterator[str]:
    for index, layer in enumerate(layers):
        for name, module in layer.module.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                yield f"layer {index}: {name} is TorchScript, whose forward cannot be replaced"


def _workaround(model: nn.Module, kinds: Sequence[SubLayerKind]) -> str:
    """Return advice for an unsupported model: a workaround that was tried and works."""
    if "ffn" in kinds:
        for layout in layouts_by_shape(model):
            with suppress(UnsupportedModelError):
                verified_layers(model, *layers_by_name(model, layout), stated=True)
                return f"name the FFN: perturbed(..., layout={layout})"
        with suppress(UnsupportedModelError):
            stack, layers = candidate_layers(model, with_ffn=False)
            verified_layers(model, stack, layers, kinds=("attention",))
            return "perturb the attention alone: Perturbation(..., where='attention')"
    return "train without masking and dropping: Perturbation()"


def _verified_layer(
    layer: DecoderLayer, call: Call | None, failure: str | None, *, stated: bool
) -> "_LayerResult":
    reason = "the layer is not called" if call is None else _error_of_rerun(call)
    if call is None or reason is not None:
        return _by_shape(layer, f"not compared: {failure or reason}")
    return _by_running(layer, call, stated=stated)


def _error_of_rerun(call: Call) -> str | None:
    try:
        call.again()
    except Exception as error:  # a layer may raise any error
        return f"{type(error).__name__}: {error}"
    return None


@dataclass(frozen=True)
class _LayerResult:
    """The result for one layer: its units, and the reasons against perturbing it."""

    layer: DecoderLayer
    ffn: tuple[str, ...]
    attention_problem: str | None


def _by_shape(layer: DecoderLayer, reason: str) -> _LayerResult:
    units = tuple(
        replace(unit, multiplied=reason, whole=None, narrows=False)
        if isinstance(unit, FeedForward)
        else unit
        for unit in preferred(layer.ffn)
    )
    problems = []
    if names := unassigned_by_shape(layer.module, units):
        problems.append(f"no FFN was recognized in {', '.join(names)}")
    if not units:
        problems.append(f"no FFN was recognized; {reason}")
    attention = None if layer.attention else "it was not found"
    return _LayerResult(replace(layer, ffn=units), tuple(problems), attention)


def _by_running(layer: DecoderLayer, call: Call, *, stated: bool) -> _LayerResult:
    analysis = LayerAnalysis(layer.module, call, layer.ffn)
    reasons = [(unit, analysis.rejection_reason(unit)) for unit in layer.ffn]
    units = tuple(unit for unit, reason in reasons if reason is None)
    attention = layer.attention
    if not stated:
        attention = attention_of(layer.module, units, called=analysis.calls)
    result = replace(layer, ffn=units, attention=attention)
    attention_problem = reason_attention_not_dropped(result, call)
    if attention is not None and attention_problem is None:
        seen = analysis.behavior(attention.module)
        if seen is None or seen.is_per_token:
            attention_problem = f"{type(attention.module).__name__} does not mix tokens"
    problems = [
        f"the layout names a module that is not an FFN: {r}" for _, r in reasons if r and stated
    ]
    names = analysis.unassigned_in_layout(units) if stated else analysis.unassigned(units)
    if names:
        problems.append(f"no FFN was recognized in {', '.join(names)}")
    if bypassed := analysis.bypassed():
        problems.append(
            f"the weights of {', '.join(bypassed)} are used without calling these modules (a fused "
            "kernel, or functional code), so that masks would have no effect"
        )
    if not problems and units:
        try:
            result = replace(result, ffn=masked(result, call))
            result = dropped(result, call)
        except UnsupportedModelError as error:
            problems.append(str(error))
    return _LayerResult(result, tuple(problems), attention_problem)


def _like_first(first: DecoderLayer, verified: DecoderLayer, other: DecoderLayer) -> DecoderLayer:
    """Return another layer of the same kind with the result of the first one."""

    def place(unit: Unit) -> int:
        return next(n for n, u in enumerate(first.ffn) if u.modules == unit.modules)

    def same(unit: Unit) -> Unit:
        counterpart = other.ffn[place(unit)]
        if not isinstance(unit, FeedForward) or not isinstance(counterpart, FeedForward):
            return counterpart
        return replace(
            counterpart,
            multiplied=unit.multiplied,
            narrows=unit.narrows,
            whole=counterpart.whole if unit.whole is not None else None,
        )

    counterparts = dict(zip(map(id, first.module.modules()), other.module.modules(), strict=True))
    attention = verified.attention
    return DecoderLayer(
        other.module,
        tuple(map(same, verified.ffn)),
        attention
        and replace(
            attention,
            module=counterparts[id(attention.module)],
            output=counterparts[id(attention.output)],
        ),
        tuple(counterparts[id(module)] for module in verified.biased),
    )


def _ranges(indices: Sequence[int]) -> str:
    """Return "0 to 5, 7" for consecutive numbers."""
    starts = [i for i in indices if i - 1 not in indices]
    ends = [i for i in indices if i + 1 not in indices]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in pairs)
