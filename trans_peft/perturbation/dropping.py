"""Cross-layer dropping (eq. 6-7): z * FFN(x), with one z per layer and forward pass.

With z = 0 the FFN is computed neither forward nor backward. Its parameters still get the gradient
of the formula, which is zero: without a gradient the optimizer would skip them, and data-parallel
training would wait for them forever. A dropped attention sub-layer is computed up to its output
projection; the backward pass skips it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.function import once_differentiable

from trans_peft.perturbation.draws import SubLayerKind
from trans_peft.perturbation.mask_site import override
from trans_peft.perturbation.units import DecoderLayer, Experts, projection_shape

__all__ = ["drop_attention", "drop_ffn"]


class DropDecision(Protocol):
    """An object with the draw of a sub-layer for the running forward pass, such as `MaskSite`."""

    @property
    def dropped(self) -> bool:
        """Whether the sub-layer is dropped."""


Parameters = Callable[[], Iterator[nn.Parameter]]


def drop_ffn(decision: DropDecision, layer: DecoderLayer, undo: ExitStack) -> None:
    """Drop the FFN of a layer with the adapters in and after it, until `undo` closes."""
    parameters = _parameters_beside(layer, "attention")
    for unit in layer.ffn:
        if isinstance(unit, Experts):
            _drop_whole(decision, unit.module, parameters, undo)
            _leave_out_adapters(decision, layer, unit.modules, undo)
        elif unit.whole is not None:
            _drop_whole(decision, unit.whole, parameters, undo)
        else:
            for projection in unit.inputs if unit.narrows else ():
                _drop_input(decision, projection, undo)
            _drop_output(decision, unit.down, parameters, undo)
            _leave_out_adapters(decision, layer, unit.modules, undo)
    for module in layer.biased:
        _zero_output(decision, module, undo)


def drop_attention(decision: DropDecision, layer: DecoderLayer, undo: ExitStack) -> None:
    """Drop the attention of a layer with an adapter after it, until `undo` closes."""
    if layer.attention is not None:
        output = layer.attention.output
        _drop_output(decision, output, _parameters_beside(layer, "ffn"), undo)
        _leave_out_adapters(decision, layer, (output,), undo)


def _drop_whole(
    decision: DropDecision, whole: nn.Module, trainable: Parameters, undo: ExitStack
) -> None:
    original = whole.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return _zeros_in_graph(x, trainable()) if decision.dropped else original(x, *args, **kwargs)

    override(whole, forward, undo)


def _zero_output(decision: DropDecision, module: nn.Module, undo: ExitStack) -> None:
    """Set the first tensor of a module's output to zero while the sub-layer is dropped."""
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if not decision.dropped:
            return result
        if isinstance(result, torch.Tensor):
            return _zeroed(result)
        return type(result)((_zeroed(result[0]), *result[1:]))

    override(module, forward, undo)


def _zeroed(x: torch.Tensor) -> torch.Tensor:
    """Return zeros in the autograd graph of x, also for infinite values of x."""
    return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0)


def _drop_input(decision: DropDecision, projection: nn.Module, undo: ExitStack) -> None:
    """Make a projection return a width of zero neurons while the sub-layer is dropped."""
    original = projection.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return x.detach()[..., :0] if decision.dropped else original(x, *args, **kwargs)

    override(projection, forward, undo)


def _drop_output(
    decision: DropDecision, projection: nn.Module, trainable: Parameters, undo: ExitStack
) -> None:
    original = projection.forward
    _, out = projection_shape(projection) or (0, 0)

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if decision.dropped:
            return _zeros_in_graph(x.new_empty((*x.shape[:-1], out)), trainable())
        return original(x, *args, **kwargs)

    override(projection, forward, undo)


def _leave_out_adapters(
    decision: DropDecision, layer: DecoderLayer, parts: tuple[nn.Module, ...], undo: ExitStack
) -> None:
    """Drop an adapter that follows the sub-layer of these parts together with the sub-layer."""
    for child in layer.module.children():
        inside = {id(module) for module in child.modules() if module is not child}
        if isinstance(child, BaseTunerLayer) and any(id(part) in inside for part in parts):
            _leave_out_adapter(decision, child, undo)


def _leave_out_adapter(decision: DropDecision, child: BaseTunerLayer, undo: ExitStack) -> None:
    original = child.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (child.get_base_layer() if decision.dropped else original)(*args, **kwargs)

    override(child, forward, undo)


def _parameters_beside(layer: DecoderLayer, other: SubLayerKind) -> Parameters:
    """Return a function that yields the layer's parameters without those of sub-layer `other`.

    Norms are included: the gradient of a norm that feeds only the dropped sub-layer is zero, too.
    """

    def parameters() -> Iterator[nn.Parameter]:
        attention = layer.attention
        if other == "attention":
            roots = [] if attention is None else [attention.module]
        else:
            roots = [module for unit in layer.ffn for module in unit.modules]
        excluded = {id(parameter) for root in roots for parameter in root.parameters()}
        return (p for p in layer.module.parameters() if id(p) not in excluded)

    return parameters


class _ZerosInGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, like: torch.Tensor, *parameters: nn.Parameter) -> torch.Tensor:
        ctx.save_for_backward(*parameters)
        return torch.zeros_like(like)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def _zeros_in_graph(x: torch.Tensor, parameters: Iterator[nn.Parameter]) -> torch.Tensor:
    """Return zeros shaped as x that give the trainable `parameters` gradients of zero.

    The dtype is that of a layer's output: autocast's if it is enabled, else x's.
    """
    device = x.device.type
    like = x.detach()
    if torch.is_autocast_enabled(device):
        like = like.to(torch.get_autocast_dtype(device))
    result: torch.Tensor = _ZerosInGraph.apply(like, *(p for p in parameters if p.requires_grad))
    return result
