"""Count the optimizer steps and micro-steps of any training loop.

torch's global post-step hook reports optimizer steps; every `torch.optim.Optimizer` calls it.
Micro-steps are the training forward passes of the decoder stack since the last step. A forward pass
inside a backward pass is a recomputation of activation checkpointing and is not counted.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from trans_peft.perturbation.draws import TrainingPosition

__all__ = ["StepCounter", "in_backward"]


def in_backward() -> bool:
    """Whether this thread runs inside a backward pass of autograd."""
    return torch._C._current_graph_task_id() != -1


class StepCounter:
    """Counts the optimizer steps and micro-steps of one decoder stack, starting at `step`.

    `position` is the training position of the running computation: that of the last training
    forward pass, and during a backward pass that of the forward pass whose gradients are computed.
    Two forward passes may therefore share one backward pass.
    """

    def __init__(self, stack: nn.Module, step: int, on_pass: Callable[[], None]) -> None:
        self.step = step
        self.position = TrainingPosition(step, 0)
        self._passes = 0
        self._stack = stack
        self._on_pass = on_pass
        self._trains_stack: WeakKeyDictionary[torch.optim.Optimizer, bool] = WeakKeyDictionary()

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self._stack.training

    def seek(self, step: int) -> None:
        """Set the number of completed optimizer steps."""
        self.step, self._passes, self.position = step, 0, TrainingPosition(step, 0)

    def start(self) -> list[RemovableHandle]:
        """Register the hooks and return their handles."""
        return [
            self._stack.register_forward_pre_hook(self._begin_pass),
            self._stack.register_forward_hook(self._end_pass),
            register_optimizer_step_post_hook(self._after_step),
        ]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin_pass(self, stack: nn.Module, _args: tuple[Any, ...]) -> None:
        if stack.training and not in_backward():
            self._on_pass()
            self.position = TrainingPosition(self.step, self._passes)
            self._passes += 1

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end_pass(self, stack: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if stack.training and hidden.requires_grad and not in_backward():
            position = self.position

            def enter_backward(_gradient: torch.Tensor) -> None:
                self.position = position

            hidden.register_hook(enter_backward)

    def _after_step(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        if optimizer not in self._trains_stack:
            stack_parameters = {id(parameter) for parameter in self._stack.parameters()}
            self._trains_stack[optimizer] = any(
                id(parameter) in stack_parameters
                for group in optimizer.param_groups
                for parameter in group["params"]
            )
        # Several optimizers of one model step one after the other, which is one step.
        if self._trains_stack[optimizer] and self._passes:
            self.step += 1
            self._passes = 0
