"""The file of scores: one line per score, with a key that is a hash of all inputs.

The file is part of the repository. On another machine only missing or changed scores are computed,
and the tables can be written without any computation.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Score", "ScoreFile"]


@dataclass(frozen=True)
class Score:
    """The results of one adapter (or of the base, `arm` "bare") on one task and one base.

    `right` has one character per item, in the order of the suite: "1" for a right answer.
    `perturbation` is that of the recipe. `train_seconds` is the time of the training loop.
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

    @property
    def cell(self) -> tuple[str, str, int, int, str, str]:
        """Task, arm, steps, seed and bases. Unlike the key, it does not depend on their content."""
        trained = (self.task, self.arm, self.steps, self.seed)
        return (*trained, self.trained_on, self.scored_on)

    @property
    def points(self) -> float:
        """Share of right answers, in percent."""
        return 100 * self.right.count("1") / len(self.right)


class ScoreFile:
    """A JSON Lines file of scores. Of two scores with the same `cell`, the later one counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._scores = {score.cell: score for score in (Score(**json.loads(x)) for x in lines)}

    def __contains__(self, key: object) -> bool:
        return any(score.key == key for score in self._scores.values())

    def __iter__(self) -> Iterator[Score]:
        return iter(self._scores.values())

    def append(self, score: Score) -> None:
        """Append one score to the file."""
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(score)) + "\n")
        self._scores[score.cell] = score
