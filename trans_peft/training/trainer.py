"""TRL's SFT trainer with a cheaper loss on devices without Triton, and training events."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTTrainer

from trans_peft.errors import TrainingCancelled, TrainingError
from trans_peft.training.events import CheckpointSaved, EventMessage, TrainingMetrics
from trans_peft.training.parent_watch import stop_requested

__all__ = [
    "AnswerTrainer",
    "EventCallback",
    "device_seconds",
    "last_checkpoint",
    "with_all_gradients",
]

_COMPLETE = "complete"
_DEVICE_SECONDS = "device_seconds"


class AnswerTrainer(SFTTrainer):
    """An `SFTTrainer` that computes logits only at positions with a label.

    TRL does so with a Triton kernel. Without Triton its fused head computes every position and
    multiplies by the vocabulary three times. On such a device, and for a sharded base, whose output
    embedding is whole during a forward pass only, this trainer selects the hidden states before the
    output embedding instead. The loss is the same sum over the same tokens.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the summed negative log-likelihood of the labels over `num_items_in_batch`."""
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.args.device.type == "cuda" and not isinstance(self.model, FSDPModule):
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
            return with_all_gradients(loss, self)
        logits, targets = self.answer_logits(model, inputs)
        loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        return self.per_item(loss, len(targets), num_items_in_batch)

    def answer_logits(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits (answer tokens, vocabulary) and the tokens that they should predict."""
        labels = inputs.pop("labels")
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        kept = targets != -100
        with _only_positions(self.model.get_output_embeddings(), kept):
            logits = model(**inputs, use_cache=False).logits
        return logits, targets[kept]

    def per_item(
        self, loss: torch.Tensor, tokens: int, items: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Return a summed loss over the items of all processes, or over the answer tokens."""
        loss = loss / torch.as_tensor(tokens if items is None else items).clamp(min=1)
        if self.args.average_tokens_across_devices and items is not None:
            loss = loss * self.accelerator.num_processes  # DDP takes the mean over processes
        return with_all_gradients(loss, self)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write no model card, because checkpoints are not published."""


def with_all_gradients(loss: torch.Tensor, trainer: Trainer) -> torch.Tensor:
    """Return the loss with a gradient, possibly zero, for every trained weight.

    PEFT's module_dropout leaves whole modules out of a step. Without a gradient for their weights
    DDP fails, and so does a step that leaves out all of them.
    """
    config = trainer.accelerator.unwrap_model(trainer.model).peft_config["default"]
    if not getattr(config, "module_dropout", 0):
        return loss
    trained = (p for p in trainer.model.parameters() if p.requires_grad)
    return loss + 0 * sum(parameter.sum() for parameter in trained)


@contextmanager
def _only_positions(head: nn.Module, kept: torch.Tensor) -> Iterator[None]:
    """Pass the output embedding only the hidden states of the kept (batch, sequence) positions."""

    def narrow(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (arguments[0][kept], *arguments[1:])

    handle = head.register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        handle.remove()


class EventCallback(TrainerCallback):
    """Reports progress, marks complete checkpoints, and raises if the loss is not finite.

    When a stop is requested, training saves a checkpoint after the current step and ends.

    `tokens_per_step[i]` are the tokens of step i + 1 without padding, over all processes.
    `earlier_device_s` are the device seconds up to the checkpoint that the training resumes from.
    """

    def __init__(
        self,
        send: Callable[[EventMessage], None],
        tokens_per_step: Sequence[int],
        earlier_device_s: float = 0.0,
    ) -> None:
        self._send = send
        self._tokens_per_step = tokens_per_step
        self._earlier_device_s = earlier_device_s
        self._first_step = 0
        self._started_s = 0.0
        self._is_cancelled = False

    @property
    def device_seconds(self) -> float:
        """The time since training started, times the number of processes, and earlier attempts."""
        seconds = time.monotonic() - self._started_s
        return self._earlier_device_s + seconds * PartialState().num_processes

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Record the start of training."""
        self._first_step = state.global_step
        self._started_s = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **_: Any,
    ) -> None:
        """Send the metrics of the step. TrainingError if the loss is not finite."""
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise TrainingError(
                f"the loss is {logs['loss']} at step {state.global_step}",
                expected="a finite loss",
                do="lower optimizer.learning_rate, raise warmup_steps, or train in float32",
            )
        if not state.is_world_process_zero:
            return
        seconds = time.monotonic() - self._started_s
        steps = state.global_step - self._first_step
        share = steps / (state.max_steps - self._first_step)
        tokens = sum(self._tokens_per_step[self._first_step : state.global_step])
        self._send(
            TrainingMetrics(
                step=state.global_step,
                total_steps=state.max_steps,
                loss=logs["loss"],
                learning_rate=logs["learning_rate"],
                grad_norm=float(logs.get("grad_norm", 0.0)),
                tokens_per_s=tokens / seconds,
                eta_s=seconds * (1 - share) / share if share >= 0.1 else None,
            )
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save a checkpoint and end training if a stop is requested from any process.

        Not after the last step: early stopping has set `should_training_stop` then.
        """
        is_last = state.global_step >= state.max_steps or control.should_training_stop
        if not is_last and _in_any_process(stop_requested.is_set()):
            self._is_cancelled = control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """TrainingCancelled if a stop was requested before the last step."""
        if self._is_cancelled:
            raise TrainingCancelled(
                f"training was terminated after step {state.global_step} of {state.max_steps}, "
                "where it saved a checkpoint"
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Mark the checkpoint as complete after every process has written its part."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / _DEVICE_SECONDS).write_text(str(self.device_seconds))
            (folder / _COMPLETE).write_text(
                "\n".join(sorted(path.name for path in folder.iterdir()))
            )
            self._send(CheckpointSaved(state.global_step))


def _in_any_process(value: bool) -> bool:
    """Return whether the value is true in any process: all of them must stop at the same step."""
    state = PartialState()
    if state.num_processes == 1:
        return value
    any_true = torch.tensor([int(value)], device=state.device)
    torch.distributed.all_reduce(any_true, op=torch.distributed.ReduceOp.MAX)
    return bool(any_true.item())


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None."""
    steps = [
        int(mark.parent.name.removeprefix("checkpoint-"))
        for mark in folder.glob(f"checkpoint-*/{_COMPLETE}")
    ]
    return folder / f"checkpoint-{max(steps)}" if steps else None


def device_seconds(checkpoint: Path | None) -> float:
    """Return the device seconds up to a checkpoint; 0 without one, or if it has no such file."""
    file = checkpoint and checkpoint / _DEVICE_SECONDS
    return float(file.read_text()) if file and file.is_file() else 0.0
