"""A trainer whose weights are differentially private with respect to single rows (DP-SGD)."""

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn.utils import get_total_norm

from trans_peft.training.dp_sgd import DpSgd
from trans_peft.training.trainer import AnswerTrainer

__all__ = ["PrivateTrainer"]


class PrivateTrainer(AnswerTrainer):
    """An `AnswerTrainer` with the gradients of DP-SGD (Abadi et al. 2016, algorithm 1).

    The gradient of step t is (sum over the drawn rows of g min(1, C / |g|) + noise) / B. Here g is
    the gradient of a row's mean loss over its answer tokens, |g| its norm over all trained weights,
    C `clip`, and B the expected number of rows. Each row has a backward pass of its own, so that
    this works for every type of adapter, and random numbers of its own (`DpSgd.seed`).
    `train_dataset` has one entry for each step.
    """

    train_dataset: Dataset
    _signature_columns: list[str]
    data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __init__(self, dp_sgd: DpSgd, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._dp_sgd = dp_sgd
        self._rows = self.train_dataset
        steps = dp_sgd.rows_of_steps(len(self._rows), self.args.max_steps)
        self.train_dataset = Dataset.from_dict({"rows": steps})
        self._collate = self.data_collator
        self.data_collator = self._one_by_one

    @property
    def tokens_per_step(self) -> list[int]:
        """The tokens of all rows of each step."""
        lengths = [len(row) for row in self._rows["input_ids"]]
        return [sum(lengths[row] for row in rows) for rows in self.train_dataset["rows"]]

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["rows"]

    def _one_by_one(self, steps: list[dict[str, Any]]) -> dict[str, Any]:
        (step,) = steps
        rows = step["rows"]
        return {"rows": [self._collate([self._rows[row]]) for row in rows], "numbers": rows}

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Set the gradients of a step, and return the mean loss of its rows; 0 without rows."""
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        loss = torch.zeros((), device=self.args.device)
        step = self.state.global_step + 1
        for number, row in zip(inputs["numbers"], inputs["rows"], strict=True):
            torch.manual_seed(self._dp_sgd.seed(step, number))
            loss += super().training_step(model, row) / len(inputs["rows"])
            # In float32, because rounding in bfloat16 could exceed `clip`.
            found = [None if w.grad is None else w.grad.float() for w in weights]
            norm = get_total_norm([gradient for gradient in found if gradient is not None])
            scale = (self._dp_sgd.clip / norm).clamp(max=1)
            for total, gradient in zip(sums, found, strict=True):
                if gradient is not None:
                    total += scale * gradient
            model.zero_grad()
        noise = self._dp_sgd.noise(step, [w.numel() for w in weights])
        for total, weight, drawn in zip(sums, weights, noise, strict=True):
            total += torch.from_numpy(drawn).view_as(total).to(total.device)
            weight.grad = (total / self._dp_sgd.batch_size).to(weight.dtype)
        return loss
