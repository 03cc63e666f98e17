"""Linear layers computed on some of their neurons only.

Masking neurons of a FFN leaves a sum over the kept ones; slicing the weights around them gives the
same sum with (1 - p_m) of the multiplications, forward and backward. The slices are taken again in
the backward pass instead of being kept until then, so a masked step needs no more memory than a
plain one.
"""

from typing import Any, Literal

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

__all__ = ["Side", "sliced_linear", "sliced_parts", "why_not_sliced"]

Side = Literal["output", "input"]
"""Which side of a layer the masked neurons are on: the output of gate and up, the input of down."""


class _SlicedLinear(torch.autograd.Function):
    """y = x W[:, kept]^T + b or y = x W[kept]^T + b[kept], without keeping the slice."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        indices: torch.Tensor,
        axis: int,
        transposed: bool,
    ) -> torch.Tensor:
        ctx.axis, ctx.transposed, ctx.has_bias = axis, transposed, bias is not None
        ctx.save_for_backward(x if weight.requires_grad else None, weight, indices)
        part = weight.index_select(axis, indices).to(x.dtype)
        return nn.functional.linear(x, part.t() if transposed else part, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, indices = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            part = weight.index_select(ctx.axis, indices).to(grad.dtype)
            grad_x = grad @ (part.t() if ctx.transposed else part)
        if ctx.needs_input_grad[1]:
            rows, columns = grad.flatten(0, -2), x.flatten(0, -2)
            part = columns.t() @ rows if ctx.transposed else rows.t() @ columns
            grad_weight = torch.zeros_like(weight)
            grad_weight.index_copy_(ctx.axis, indices, part.to(weight.dtype))
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, grad_weight, grad_bias, None, None, None


def sliced_linear(
    layer: nn.Linear | Conv1D, side: Side, x: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """Return what `layer` (Linear or Conv1D) gives on the neurons at `indices` (kept,).

    x: (..., in) for side "output", (..., kept) for "input"; returns (..., kept) or (..., out), in
    the dtype that the layer itself would give, autocast included.
    """
    transposed = isinstance(layer, Conv1D)
    if side == "output":
        bias = layer.bias if layer.bias is None else layer.bias.index_select(0, indices)
    else:
        bias = layer.bias
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    axis = (0 if side == "output" else 1) ^ int(transposed)
    result: torch.Tensor = _SlicedLinear.apply(x, layer.weight, bias, indices, axis, transposed)
    return result


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) in (nn.Linear, Conv1D) and "forward" not in layer.__dict__


def why_not_sliced(projection: Any) -> str | None:
    """Return why a projection cannot be sliced, or None where it can.

    A plain Linear or Conv1D can, and LoRA on one. What computes anything else of its weight cannot:
    quantised layers, DoRA, other PEFT methods, parametrised or offloaded layers.
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
    """Return the layers inside a sliceable projection that touch its masked side."""
    if isinstance(projection, nn.Linear | Conv1D):
        return (projection,)
    branch = projection.lora_B if side == "output" else projection.lora_A
    return (projection.base_layer, *branch.values())
