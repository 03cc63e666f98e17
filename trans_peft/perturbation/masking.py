"""Intra-layer masking (eq. 4-5): FFN(x) = W_down (m * act(...)), with one m per forward pass.

If every projection of an FFN can be sliced, masked neurons are not computed (`slicing`). Otherwise
the intermediate activation is multiplied by the mask, which gives the same sum without the saving.
"""

from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trans_peft.domain.recipe import Perturbation
from trans_peft.errors import UnsupportedModelError
from trans_peft.perturbation.mask_site import override
from trans_peft.perturbation.slicing import (
    NeuronSelection,
    Side,
    reason_not_sliced,
    sliced_linear,
    sliced_parts,
)
from trans_peft.perturbation.units import Attention, Experts, FeedForward, Unit, projection_shape

__all__ = ["mask_attention", "mask_ffn"]


class Masks(Protocol):
    """The masks of a sub-layer's units for the running forward pass, such as `MaskSite`."""

    @property
    def active(self) -> bool:
        """Whether the model is in training mode."""

    @property
    def perturbation(self) -> Perturbation:
        """The probabilities and the granularity."""

    def kept(self, unit: int, parts: int, device: torch.device) -> NeuronSelection | None:
        """Return the neurons of a unit to compute; None for all of them."""

    def masked(self, unit: int, x: torch.Tensor) -> torch.Tensor:
        """Return x (..., neurons of the unit) with its masked neurons set to zero."""


def mask_ffn(mask_site: Masks, units: tuple[Unit, ...], undo: ExitStack) -> str | None:
    """Mask an FFN until `undo` closes. Return why it is not sliced; None if it is."""
    reasons = []
    for number, unit in enumerate(units):
        if isinstance(unit, Experts):
            reasons.append(_mask_experts(mask_site, number, unit, undo))
        elif reason := _reason_not_sliced(mask_site, unit):
            reasons.append(reason)
            _mask_input(mask_site, number, unit.down, undo)
        else:
            _slice(mask_site, number, unit, undo)
    return "; ".join(dict.fromkeys(reasons)) or None


def mask_attention(mask_site: Masks, attention: Attention, undo: ExitStack) -> str:
    """Mask the inputs of the output projection until `undo` closes. Return why it is not sliced."""
    _mask_input(mask_site, 0, attention.output, undo)
    return "heads are not sliced"


def _reason_not_sliced(mask_site: Masks, unit: FeedForward) -> str | None:
    if mask_site.perturbation.granularity == "element":
        return "each element has its own bit"
    if unit.multiplied is not None:
        return unit.multiplied
    reasons = (reason_not_sliced(projection) for projection in (*unit.inputs, unit.down))
    return next((reason for reason in reasons if reason is not None), None)


def _slice(mask_site: Masks, number: int, unit: FeedForward, undo: ExitStack) -> None:
    sides: list[tuple[nn.Module, Side]] = [(projection, "output") for projection in unit.inputs]
    for projection, side in [*sides, (unit.down, "input")]:
        _, out = projection_shape(projection) or (0, 0)
        parts = out // unit.neurons if side == "output" else 1
        for part in sliced_parts(projection, side):
            _slice_part(mask_site, number, part, side, parts, undo)


def _slice_part(
    mask_site: Masks, number: int, part: nn.Linear | Conv1D, side: Side, parts: int, undo: ExitStack
) -> None:
    dense = part.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        kept = mask_site.kept(number, parts, x.device)
        return dense(x) if kept is None else sliced_linear(part, side, x, kept)

    override(part, forward, undo)


def _mask_input(mask_site: Masks, number: int, projection: nn.Module, undo: ExitStack) -> None:
    original = projection.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(mask_site.masked(number, x), *args, **kwargs)

    override(projection, forward, undo)


def _mask_experts(mask_site: Masks, number: int, unit: Experts, undo: ExitStack) -> str:
    """Mask the same neurons in every expert, in the results of the module's gates."""
    if mask_site.perturbation.granularity == "element":
        raise UnsupportedModelError(
            "element-wise masks are not defined for a mixture of experts: the tokens of an expert, "
            "and their order, depend on the implementation",
            expected="granularity 'neuron'",
            do="use granularity='neuron'",
        )
    experts = unit.module.forward
    applied = False

    def mask_gate(name: str) -> None:
        gate = getattr(unit.module, name)
        owner, attribute = (gate, "forward") if isinstance(gate, nn.Module) else (unit.module, name)
        original = getattr(owner, attribute)

        def masked(*args: Any, **kwargs: Any) -> Any:
            nonlocal applied
            result = original(*args, **kwargs)
            if not isinstance(result, torch.Tensor) or result.shape[-1] != unit.neurons:
                return result
            applied = True
            return mask_site.masked(number, result)

        override(owner, masked, undo, attribute)

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal applied
        applied = False
        result = experts(*args, **kwargs)
        if mask_site.active and not applied and result.numel():
            raise UnsupportedModelError(
                f"{type(unit.module).__name__} does not call {' or '.join(unit.gates)}, "
                "so its neurons cannot be masked",
            )
        return result

    for name in unit.gates:
        mask_gate(name)
    override(unit.module, forward, undo)
    return "experts are not sliced"
