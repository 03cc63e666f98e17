"""Intra-layer masking (eq. 4-5): FFN(x) = W_down (m * act(...)), m drawn anew for every forward.

Where every projection of a FFN can be sliced, the masked neurons are sliced away (`slicing`). Else
the intermediate activation is multiplied by the mask: the same sum, without the saving.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trans_peft.errors import UnsupportedModelError
from trans_peft.perturbation.ffn import Attention, Experts, FeedForward, projection_shape
from trans_peft.perturbation.site import Site, override
from trans_peft.perturbation.slicing import Side, sliced_linear, sliced_parts, why_not_sliced

__all__ = ["mask_attention", "mask_ffn"]


def mask_ffn(site: Site, units: tuple[FeedForward | Experts, ...], undo: ExitStack) -> str | None:
    """Mask a FFN until `undo` closes; return why it is not sliced, None if it is."""
    reasons = []
    for number, unit in enumerate(units):
        if isinstance(unit, Experts):
            reasons.append(_mask_experts(site, number, unit, undo))
        elif reason := _why_multiplied(site, unit):
            reasons.append(reason)
            _mask_input(site, number, unit.down, undo)
        else:
            _slice(site, number, unit, undo)
    return "; ".join(dict.fromkeys(reasons)) or None


def mask_attention(site: Site, attention: Attention, undo: ExitStack) -> str:
    """Mask the inputs of the output projection; heads are never sliced, return that."""
    _mask_input(site, 0, attention.output, undo)
    return "heads are not sliced"


def _why_multiplied(site: Site, unit: FeedForward) -> str | None:
    if site.perturbation.granularity == "element":
        return "each element has its own bit"
    reasons = (why_not_sliced(projection) for projection in (*unit.inputs, unit.down))
    return next((reason for reason in reasons if reason is not None), None)


def _slice(site: Site, number: int, unit: FeedForward, undo: ExitStack) -> None:
    sides: list[tuple[nn.Module, Side]] = [(projection, "output") for projection in unit.inputs]
    for projection, side in [*sides, (unit.down, "input")]:
        _, out = projection_shape(projection) or (0, 0)
        parts = out // unit.neurons if side == "output" else 1
        for part in sliced_parts(projection, side):
            _slice_part(site, number, part, side, parts, undo)


def _slice_part(
    site: Site, number: int, part: nn.Linear | Conv1D, side: Side, parts: int, undo: ExitStack
) -> None:
    dense = part.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        kept = site.kept(number, parts, x.device)
        return dense(x) if kept is None else sliced_linear(part, side, x, kept)

    override(part, forward, undo)


def _mask_input(site: Site, number: int, projection: nn.Module, undo: ExitStack) -> None:
    original = projection.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(site.masked(number, x), *args, **kwargs)

    override(projection, forward, undo)


def _mask_experts(site: Site, number: int, unit: Experts, undo: ExitStack) -> str:
    """Mask the same neurons in every expert, where they leave the activation (before `* up`)."""
    if site.perturbation.granularity == "element":
        raise UnsupportedModelError(
            "element-wise masks are not defined for a mixture of experts: which tokens an expert "
            "sees, and in which order, is its implementation's choice",
            do="use granularity='neuron'",
        )
    activate, experts = unit.activation.forward, unit.module.forward
    applied = False

    def activation(x: torch.Tensor) -> torch.Tensor:
        nonlocal applied
        applied = x.shape[-1] == unit.neurons
        return site.masked(number, activate(x)) if applied else activate(x)

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal applied
        applied = False
        result = experts(*args, **kwargs)
        if site.active and not applied:
            raise UnsupportedModelError(
                f"{type(unit.module).__name__} computes without its activation module, so that its "
                "neurons cannot be masked",
                do="load the model with experts_implementation='eager'",
            )
        return result

    override(unit.activation, activation, undo)
    override(unit.module, forward, undo)
    return "experts are not sliced"
