"""Where training stands, observed from outside any training loop.

Optimiser steps are seen through torch's global post-step hook, which every `torch.optim.Optimizer`
calls in whatever loop it is used. Micro-steps are the training forwards of the decoder stack since
then; a forward inside a backward pass is activation checkpointing recomputing, and counts nothing.
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
    """Whether this thread runs inside autograd's backward pass (torch's own test for it)."""
    return torch._C._current_graph_task_id() != -1


class StepCounter:
    """Counts optimiser steps and micro-steps of one decoder stack, from `step` on.

    `now` is the moment that the running computation belongs to: that of the last training forward,
    and during a backward pass that of the forward whose gradients are being computed, so that two
    forwards may share one backward.
    """

    def __init__(self, stack: nn.Module, step: int, on_pass: Callable[[], None]) -> None:
        self.step = step
        self.now = TrainingPosition(step, 0)
        self._passes = 0
        self._stack = stack
        self._on_pass = on_pass
        self._trains: WeakKeyDictionary[torch.optim.Optimizer, bool] = WeakKeyDictionary()

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self._stack.training

    def seek(self, step: int) -> None:
        """Continue as after `step` optimiser steps."""
        self.step, self._passes, self.now = step, 0, TrainingPosition(step, 0)

    def start(self) -> list[RemovableHandle]:
        """Begin to observe; the handles end it."""
        return [
            self._stack.register_forward_pre_hook(self._begin_pass),
            self._stack.register_forward_hook(self._end_pass),
            register_optimizer_step_post_hook(self._after_step),
        ]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin_pass(self, stack: nn.Module, _args: tuple[Any, ...]) -> None:
        if stack.training and not in_backward():
            self._on_pass()
            self.now = TrainingPosition(self.step, self._passes)
            self._passes += 1

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end_pass(self, stack: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if stack.training and hidden.requires_grad and not in_backward():
            position = self.now

            def enter_backward(_gradient: torch.Tensor) -> None:
                self.now = position

            hidden.register_hook(enter_backward)

    def _after_step(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        if optimizer not in self._trains:
            ours = {id(parameter) for parameter in self._stack.parameters()}
            self._trains[optimizer] = any(
                id(parameter) in ours
                for group in optimizer.param_groups
                for parameter in group["params"]
            )
        # Two optimisers that share the model's parameters step after one another: one step.
        if self._trains[optimizer] and self._passes:
            self.step += 1
            self._passes = 0
