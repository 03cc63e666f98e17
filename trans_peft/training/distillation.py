"""Train an adapter on the probabilities of a teacher instead of on labels.

A teacher answers prompts, and the distributions from which it chose the tokens of its answers are
kept as `TeacherTargets`, so that it need not be in memory while the student is trained. The loss is
the Kullback-Leibler divergence from the teacher to the student (Hinton et al. 2015, at temperature
1), over the teacher's most likely tokens and one outcome for all others
(`trans_peft.validation.decoding.next_tokens`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn

from trans_peft.training.trainer import AnswerTrainer
from trans_peft.validation.decoding.generation import Answers
from trans_peft.validation.decoding.next_tokens import (
    NextTokens,
    divergences,
    mean_kl,
    next_tokens,
)

__all__ = ["DistillationTrainer", "TeacherTargets", "amplified"]


@dataclass(frozen=True)
class TeacherTargets:
    """Answers of a teacher, and the distributions from which it chose their tokens.

    Attributes:
        prompts: token ids of each prompt.
        answers: token ids of each answer, including the token that ended it.
        next_tokens: for each answer one distribution per token.
    """

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    next_tokens: Sequence[NextTokens]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], answers: Answers) -> "TeacherTargets":
        """Return the targets for the answers that `generate` gave with `top`."""
        return cls(prompts, answers.ids, answers.next_tokens)

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: Sequence[int]) -> "TeacherTargets":
        """Return the targets of some rows, in the given order."""
        return TeacherTargets(*([part[row] for row in rows] for part in vars(self).values()))

    def at_most(self, max_length: int) -> "TeacherTargets":
        """Return the rows whose prompt and answer have at most `max_length` tokens."""
        pairs = enumerate(zip(self.prompts, self.answers, strict=True))
        return self.select([row for row, pair in pairs if sum(map(len, pair)) <= max_length])

    def along(self, model: nn.Module) -> NextTokens:
        """Return a model's distributions over the same tokens, at all positions."""
        return next_tokens(model, self._pairs, like=NextTokens.joined(self.next_tokens))

    def divergence(self, model: nn.Module) -> float:
        """Return the mean divergence of a model from the teacher, in nats per answer token."""
        return mean_kl(NextTokens.joined(self.next_tokens), self.along(model))

    @property
    def _pairs(self) -> list[tuple[Sequence[int], Sequence[int]]]:
        """Prompts and the parts of the answers after which a token of the answer follows."""
        return [(p, a[:-1]) for p, a in zip(self.prompts, self.answers, strict=True)]

    def write(self, path: Path) -> Path:
        """Write the targets as a safetensors file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        ids = [token for part in (self.prompts, self.answers) for row in part for token in row]
        save_file(
            {
                "prompt_lengths": torch.tensor([len(prompt) for prompt in self.prompts]),
                "answer_lengths": torch.tensor([len(answer) for answer in self.answers]),
                "ids": torch.tensor(ids),
                **vars(NextTokens.joined(self.next_tokens)),
            },
            path,
        )
        return path

    @classmethod
    def read(cls, path: Path) -> "TeacherTargets":
        """Read a file that `write` wrote."""
        tensors = load_file(path)
        prompts, answers = (
            tensors.pop(f"{part}_lengths").tolist() for part in ("prompt", "answer")
        )
        ids = [row.tolist() for row in tensors.pop("ids").split([*prompts, *answers])]
        return cls(ids[: len(prompts)], ids[len(prompts) :], NextTokens(**tensors).split(answers))

    def training_rows(self) -> list[dict[str, list[int]]]:
        """Return the rows in TRL's format, with a mask of the answers."""
        return [
            {
                "input_ids": [*prompt, *answer],
                "completion_mask": [0] * len(prompt) + [1] * len(answer),
            }
            for prompt, answer in zip(self.prompts, self.answers, strict=True)
        ]


def amplified(
    targets: TeacherTargets, old: NextTokens, new: NextTokens, beta: float
) -> TeacherTargets:
    """Return the targets of the new base, changed as the adapter changed the old base.

    The log-probabilities are log p_new + beta * (log p_teacher - log p_old), normalized. `old` and
    `new` are `targets.along` of the two bases without an adapter. With beta = 1 and equal bases the
    targets do not change.
    """
    teacher = NextTokens.joined(targets.next_tokens)
    log_p, old_log_p, new_log_p = (
        torch.cat([p.log_p, p.rest.clamp(min=-50)[:, None]], dim=1) for p in (teacher, old, new)
    )
    changed = (new_log_p + beta * (log_p - old_log_p)).log_softmax(-1)
    lengths = [len(answer) for answer in targets.answers]
    rest = changed[:, -1].masked_fill(teacher.rest.isinf(), -torch.inf)
    found = NextTokens(teacher.tokens, changed[:, :-1], rest)
    return TeacherTargets(targets.prompts, targets.answers, found.split(lengths))


class DistillationTrainer(AnswerTrainer):
    """An `AnswerTrainer` whose loss is the divergence from stored targets.

    Row i of `train_dataset` must be row i of `targets.training_rows()`.
    """

    _signature_columns: list[str]
    data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __init__(self, targets: TeacherTargets, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._targets = targets
        rows = list(range(len(targets)))
        self.train_dataset: Dataset = self.train_dataset.add_column("row", rows)
        self._collate = self.data_collator
        self.data_collator = self._with_targets

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "row" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "row"]

    def _with_targets(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self._collate(examples)
        rows = [example["row"] for example in examples]
        return batch | vars(NextTokens.joined([self._targets.next_tokens[row] for row in rows]))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the summed divergence of the answer tokens over `num_items_in_batch`."""
        teacher = NextTokens(*(inputs.pop(name) for name in ("tokens", "log_p", "rest")))
        logits, targets = self.answer_logits(model, inputs)
        loss = divergences(teacher, NextTokens.of(logits, teacher.tokens)).sum()
        return self.per_item(loss, len(targets), num_items_in_batch)
