"""Means over seeds and items, and intervals that resample both.

An adapter's score varies with the seed it was trained from and with the questions that happened to
be asked, so both are drawn again, with replacement: seeds and items, the same for every arm, since
all arms share them (a bootstrap of a crossed design; Owen 2007, "The pigeonhole bootstrap", shows
that it errs on the wide side). With few seeds the interval is coarse, and says so by its width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Draw", "Interval", "interval", "right"]

_DRAWS = 4_000
_LEVEL = 0.95

Draw = Callable[[np.ndarray], float]
"""Gives the score, in points, of one arm's answers (seeds, items) in one draw."""


@dataclass(frozen=True)
class Interval:
    """An estimate in points and the middle 95 % of its resampled values."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.1f} ({self.low:+.1f}, {self.high:+.1f})"

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0


def right(answers: Mapping[int, str], seeds: Sequence[int]) -> np.ndarray:
    """Return an arm's right answers as (seeds, items) of 0 and 1."""
    return np.array([[mark == "1" for mark in answers[seed]] for seed in seeds], dtype=float)


def interval(statistic: Callable[[Draw], float], seeds: int, items: int) -> Interval:
    """Return a statistic with its interval; the draws are the same in every call.

    `statistic` computes its value from arms by the function it is given: the mean of the real
    answers for the estimate, then that of each draw.
    """
    generator = np.random.default_rng(0)

    def weighted(by_seed: np.ndarray, by_item: np.ndarray) -> Draw:
        # Counts, divided last: sums of whole numbers are the same on every machine.
        return lambda answers: float(100 * (by_seed @ answers @ by_item) / (seeds * items))

    values = np.array(
        [
            statistic(
                weighted(
                    generator.multinomial(seeds, np.full(seeds, 1 / seeds)),
                    generator.multinomial(items, np.full(items, 1 / items)),
                )
            )
            for _ in range(_DRAWS)
        ]
    )
    estimate = statistic(weighted(np.ones(seeds), np.ones(items)))
    tail = (1 - _LEVEL) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))
