"""The scores of docs/survival.md: one line per score, with a key that is a hash of all inputs.

An experiment has no arms for compensated or distilled adapters, so this file has its own format. It
is part of the repository. On another machine only missing or changed scores are computed, and the
tables can be written without any computation.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trans_peft.experiment import score_file

__all__ = ["Score", "ScoreFile"]


@dataclass(frozen=True)
class Score:
    """The results of one adapter on one task and one base.

    `arm` says how it was trained and carried over. `right` has one character per item, in the order
    of the suite: "1" for a right answer. In a task whose answers have degrees, it is empty, and
    `degrees` has a number from 0 to 1 for each item. `perturbation` is that of the recipe.
    `train_seconds` are the seconds of the training loop, or of the recovery strategy.
    """

    key: str
    task: str
    arm: str
    steps: int
    seed: int
    trained_on: str
    scored_on: str
    right: str
    perturbation: dict[str, Any]
    train_seconds: float
    degrees: list[float] = field(default_factory=list)

    @property
    def results(self) -> list[float]:
        """The result of each item, from 0 to 1."""
        return self.degrees or [float(mark) for mark in self.right]

    @property
    def cell(self) -> tuple[str, str, int, int, str, str]:
        """Task, arm, steps, seed and bases. Unlike the key, it does not depend on their content."""
        trained = (self.task, self.arm, self.steps, self.seed)
        return (*trained, self.trained_on, self.scored_on)

    @property
    def points(self) -> float:
        """The mean result, in percent."""
        return 100 * sum(self.results) / len(self.results)


class ScoreFile(score_file.ScoreFile[Score]):
    """A JSON Lines file of these scores."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Score)
