"""The loss on held-out rows during a training: early stopping, and the best weights.

All decisions follow from the trainer's log, which is part of its checkpoints. A resumed run
therefore stops at the same step, and keeps the same weights, as an uninterrupted one.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trans_peft.domain.validation import ValidationSettings
from trans_peft.errors import TrainingError
from trans_peft.training.adapter_check import save_adapter
from trans_peft.training.events import EventMessage, ValidationMetrics
from trans_peft.training.trainer import AnswerTrainer

__all__ = ["ValidationCallback", "held_out_loss"]

_LOSS = "validation_loss"
_COPIED = "best-"
"""Starts the names of files in a checkpoint that are copies of the best weights."""

Evaluation = tuple[int, float]
"""A step, and the loss on the validation rows after it."""


class ValidationCallback(TrainerCallback):
    """Computes the validation loss, stores the best weights, and stops a training early.

    `rows` are validation rows in TRL's format (`trans_peft.training.finetune.token_rows`). The
    weights with the lowest loss so far are PEFT folders in `folder`, named by their step.
    """

    def __init__(
        self,
        trainer: AnswerTrainer,
        rows: Sequence[dict[str, list[int]]],
        settings: ValidationSettings,
        folder: Path,
        send: Callable[[EventMessage], None],
    ) -> None:
        self._trainer = trainer
        self._rows = rows
        self._settings = settings
        self._folder = folder
        self._send = send

    def kept(self) -> Evaluation:
        """Return the step whose weights become the adapter, and their loss, after the training."""
        state = self._trainer.state
        return _best(state) if self._keeps_best else _evaluations(state)[-1]

    def kept_folder(self) -> Path | None:
        """Return the PEFT folder of these weights; None if the model has them."""
        return self._folder / str(self.kept()[0]) if self._keeps_best else None

    @property
    def _keeps_best(self) -> bool:
        return self._settings.keep == "best"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Compute the loss if it is due after this step."""
        step = state.global_step
        if step % self._settings.every_steps and step < state.max_steps:
            return
        loss = held_out_loss(self._trainer, self._rows)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss on the validation rows is {loss} after step {step}",
                expected="a finite loss",
                do="lower optimizer.learning_rate, raise warmup_steps, or train in float32",
            )
        state.log_history.append({"step": step, _LOSS: loss})
        best_step = _best(state)[0]
        if state.is_world_process_zero:
            if step == best_step and self._keeps_best:
                with self._new_folder(step) as folder:
                    save_adapter(self._trainer.model, folder)
            self._send(ValidationMetrics(step, loss, best_step))
        later = sum(evaluated > best_step for evaluated, _ in _evaluations(state))
        if self._settings.stop_after and later >= self._settings.stop_after:
            control.should_training_stop = True
            # The trainer would make a further step if it resumed from a checkpoint of this step.
            control.should_save = False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Delete weights that are not needed any more, and copy the others into the checkpoint.

        The copy is for a run that continues on another host.
        """
        if state.is_world_process_zero and _evaluations(state):
            best_step = _best(state)[0]
            for folder in self._folder.glob("*"):
                if folder.name != str(best_step):
                    shutil.rmtree(folder)
                    continue
                for path in folder.iterdir():
                    shutil.copyfile(path, _checkpoint(args, state) / f"{_COPIED}{path.name}")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take the best weights from the checkpoint if another host saved them."""
        if not (state.is_world_process_zero and self._keeps_best and _evaluations(state)):
            return
        step = _best(state)[0]
        if (self._folder / str(step)).exists():
            return
        with self._new_folder(step) as folder:
            folder.mkdir()
            for path in _checkpoint(args, state).glob(f"{_COPIED}*"):
                shutil.copyfile(path, folder / path.name.removeprefix(_COPIED))

    @contextmanager
    def _new_folder(self, step: int) -> Iterator[Path]:
        """Yield a path to write to, which replaces the folder of this step afterwards."""
        partial = self._folder.with_name(f"{self._folder.name}.partial")
        for leftover in (partial, self._folder / str(step)):
            shutil.rmtree(leftover, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.rename(self._folder / str(step))


def _checkpoint(arguments: TrainingArguments, state: TrainerState) -> Path:
    return Path(arguments.output_dir) / f"checkpoint-{state.global_step}"


def _evaluations(state: TrainerState) -> list[Evaluation]:
    """Return all validation losses of a run, in order."""
    return [(log["step"], log[_LOSS]) for log in state.log_history if _LOSS in log]


def _best(state: TrainerState) -> Evaluation:
    """Return the step with the lowest loss, the first of equal ones, and its loss."""
    return min(_evaluations(state), key=lambda found: (found[1], found[0]))


def held_out_loss(trainer: AnswerTrainer, rows: Sequence[dict[str, list[int]]]) -> float:
    """Return the mean negative log-likelihood of the rows' answer tokens, in nats.

    The mean is over the tokens of all rows, so that it does not depend on the batch size. Each
    process computes a part of the rows. No random number is drawn, and the model's mode is
    restored.
    """
    state, model = trainer.accelerator.state, trainer.model
    size, longest = trainer.args.per_device_eval_batch_size, trainer.args.max_length
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))  # less padding
    own = [_labelled(row, longest) for row in ordered[state.process_index :: state.num_processes]]
    # A sharded base is gathered in every pass, so all processes need the same number of passes.
    passes = math.ceil(math.ceil(len(rows) / state.num_processes) / size)
    total = torch.zeros(2, dtype=torch.float64, device=state.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for number in range(passes):
                batch = own[number * size : (number + 1) * size]
                inputs = trainer.data_collator(batch or [_labelled(ordered[0], longest)])
                inputs = send_to_device(inputs, state.device)
                logits, targets = trainer.answer_logits(model, inputs)
                loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
                if batch:
                    total += torch.stack([loss.double(), torch.tensor(len(targets)).to(loss)])
    finally:
        model.train(was_training)
    summed, tokens = trainer.accelerator.reduce(total).tolist()
    return float(summed / tokens)


def _labelled(row: dict[str, list[int]], longest: int) -> dict[str, list[int]]:
    pairs = zip(row["input_ids"], row["completion_mask"], strict=True)
    labels = [token if is_answer else -100 for token, is_answer in pairs]
    return {"input_ids": row["input_ids"][:longest], "labels": labels[:longest]}
