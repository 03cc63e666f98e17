"""What was scored, one line each, under a key that the content of everything behind it makes.

The file is kept with the code: on another machine only what is missing, or what has changed, is
done again, and the table can be printed without doing anything.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Ledger", "Score"]


@dataclass(frozen=True)
class Score:
    """One adapter's answers (`arm` "bare": the base's own) to one task on one base.

    `right` has one character an item, in the order of the suite: "1" for a right answer.
    `perturbation` is what stood in the recipe, `train_seconds` the time of the loop alone.
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
        """What was asked, by name: what it was made of may have changed since."""
        who = (self.task, self.arm, self.steps, self.seed)
        return (*who, self.trained_on, self.scored_on)

    @property
    def points(self) -> float:
        """Right answers in a hundred."""
        return 100 * self.right.count("1") / len(self.right)


class Ledger:
    """A JSON Lines file of scores; of two that answer the same question the later counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._scores = {score.cell: score for score in (Score(**json.loads(x)) for x in lines)}

    def __contains__(self, key: object) -> bool:
        return any(score.key == key for score in self._scores.values())

    def __iter__(self) -> Iterator[Score]:
        return iter(self._scores.values())

    def append(self, score: Score) -> None:
        """Write one score down; it is kept from here on."""
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(score)) + "\n")
        self._scores[score.cell] = score
