"""Linear layers that compute only some of their neurons.

Masking the neurons of an FFN leaves a sum over the other neurons. Slicing the weights gives the
same sum with (1 - p_m) of the multiplications, forward and backward. The backward pass slices
again instead of keeping the slices, so a masked step needs no more memory than a plain step.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

__all__ = [
    "NeuronSelection",
    "Side",
    "neurons_to_compute",
    "reason_not_sliced",
    "sliced_linear",
    "sliced_parts",
]

_WIDTH = 16
"""The number of computed neurons is a multiple of this. Others are slower: 5 % on a CPU, more on
tensor cores."""

Side = Literal["output", "input"]
"""Side of a layer with the masked neurons: the output of gate and up, the input of down."""


@dataclass(frozen=True, eq=False)
class NeuronSelection:
    """The neurons to compute, as ascending indices (n,) int64 on the device of the weights.

    Masked neurons may be included to round n up to a width that is fast for matrix kernels.
    `padding` are their positions among the indices; None if there are none. The input side treats
    their weights as zero, so that they add nothing. A fused layer has the indices of its parts,
    one block after the other.
    """

    indices: torch.Tensor
    padding: torch.Tensor | None


def neurons_to_compute(
    kept: np.ndarray, parts: int, device: torch.device
) -> NeuronSelection | None:
    """Return the neurons to compute, given `kept` (neurons,) bool; None for all of them.

    A fused projection has the neurons `parts` times, one block after the other.
    """
    (masked,) = (~kept).nonzero()
    if not len(masked):
        return None
    computed = kept.copy()
    computed[masked[: -int(kept.sum()) % _WIDTH]] = True
    (indices,) = computed.nonzero()
    (padding,) = (~kept[indices]).nonzero()
    fused = np.concatenate([indices + part * len(kept) for part in range(parts)])
    return NeuronSelection(
        torch.from_numpy(fused).to(device, non_blocking=True),
        torch.from_numpy(padding).to(device, non_blocking=True) if len(padding) else None,
    )


class _SlicedLinear(torch.autograd.Function):
    """y = x W[indices]^T + b (axis 0) or y = x W[:, indices]^T + b, without keeping the slice."""

    @staticmethod
    def forward(  # noqa: PLR0913  autograd passes no keywords
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        kept: NeuronSelection,
        axis: int,
        transposed: bool,
    ) -> torch.Tensor:
        ctx.axis, ctx.transposed = axis, transposed
        ctx.has_bias = bias is not None
        ctx.save_for_backward(
            x if weight.requires_grad else None, weight, kept.indices, kept.padding
        )
        part = _without(weight.index_select(axis, kept.indices), kept.padding, axis).to(x.dtype)
        return nn.functional.linear(x, part.t() if transposed else part, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, indices, padding = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            part = _without(weight.index_select(ctx.axis, indices), padding, ctx.axis)
            part = part.to(grad.dtype)
            grad_x = grad @ (part.t() if ctx.transposed else part)
        if ctx.needs_input_grad[1]:
            rows, columns = grad.flatten(0, -2), x.flatten(0, -2)
            part = columns.t() @ rows if ctx.transposed else rows.t() @ columns
            part = _without(part, padding, ctx.axis).to(weight.dtype)
            grad_weight = torch.zeros_like(weight).index_copy_(ctx.axis, indices, part)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, grad_weight, grad_bias, None, None, None


def _without(part: torch.Tensor, padding: torch.Tensor | None, axis: int) -> torch.Tensor:
    """Set the padding of a slice to zero, in place, and return the slice."""
    return part if padding is None else part.index_fill_(axis, padding, 0)


def sliced_linear(
    layer: nn.Linear | Conv1D, side: Side, x: torch.Tensor, kept: NeuronSelection
) -> torch.Tensor:
    """Return the output of `layer` (Linear or Conv1D), computed for the kept neurons only.

    x is (..., in) for side "output" and (..., n) for "input". The result is (..., n) or (..., out),
    in the dtype of the layer's own output, autocast included.
    """
    bias = layer.bias
    if side == "output":
        kept = NeuronSelection(kept.indices, padding=None)
        bias = bias if bias is None else bias.index_select(0, kept.indices)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    transposed = isinstance(layer, Conv1D)
    axis = (0 if side == "output" else 1) ^ int(transposed)
    result: torch.Tensor = _SlicedLinear.apply(x, layer.weight, bias, kept, axis, transposed)
    return result


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) in (nn.Linear, Conv1D) and "forward" not in layer.__dict__


def reason_not_sliced(projection: Any) -> str | None:
    """Return why a projection cannot be sliced, or None if it can.

    A plain Linear or Conv1D can be sliced, and LoRA on one. Layers that use their whole weight
    cannot: quantized layers, DoRA, other PEFT methods, parametrized or offloaded layers.
    """
    if _is_plain(projection):
        return None
    if type(projection) is not LoraLinear:
        return f"{type(projection).__name__} is not a plain linear layer"
    if projection.lora_variant:
        variants = {type(variant).__name__ for variant in projection.lora_variant.values()}
        return f"{', '.join(sorted(variants))} needs the whole weight"
    parts = [projection.base_layer, *projection.lora_A.values(), *projection.lora_B.values()]
    for part in parts:
        if not _is_plain(part):
            return f"LoRA on {type(part).__name__}, which is not a plain linear layer"
    return None


def sliced_parts(projection: Any, side: Side) -> tuple[nn.Linear | Conv1D, ...]:
    """Return the layers inside a sliceable projection that have its masked side."""
    if isinstance(projection, nn.Linear | Conv1D):
        return (projection,)
    branch = projection.lora_B if side == "output" else projection.lora_A
    return (projection.base_layer, *branch.values())
