"""Compute means over seeds and items, and intervals that resample both.

The score of an adapter varies with its seed and with the choice of items. Both are resampled with
replacement, in the same way for every arm, because all arms share them. This is a bootstrap of a
crossed design; Owen 2007, "The pigeonhole bootstrap", shows that its intervals tend to be too wide.
With few seeds the intervals are coarse.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

__all__ = ["Draw", "Interval", "interval", "right"]

_DRAWS = 4_000
_LEVEL = 0.95

Draw = Callable[[np.ndarray], float]
"""Returns the score in points of one arm's results (seeds, items) in one draw."""


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
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def right(answers: Mapping[int, str], seeds: Sequence[int]) -> np.ndarray:
    """Return an arm's results as an array (seeds, items) of 0 and 1."""
    return np.array([[mark == "1" for mark in answers[seed]] for seed in seeds], dtype=float)


def interval(statistic: Callable[[Draw], float], seeds: int, items: int) -> Interval:
    """Return a statistic with its interval. The draws are the same in every call.

    `statistic` takes a function that returns the score of an arm: first the mean of all results,
    for the estimate, then the mean in each draw.
    """

    def weighted(by_seed: np.ndarray, by_item: np.ndarray) -> Draw:
        # Counts, divided last: sums of whole numbers are the same on every machine.
        return lambda answers: float(100 * (by_seed @ answers @ by_item) / (seeds * items))

    values = np.array([statistic(weighted(*counts)) for counts in _draws(seeds, items)])
    estimate = statistic(weighted(np.ones(seeds), np.ones(items)))
    tail = (1 - _LEVEL) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))


@cache
def _draws(seeds: int, items: int) -> Sequence[tuple[np.ndarray, np.ndarray]]:
    """Return how often each draw takes each seed and each item."""
    generator = np.random.default_rng(0)
    return [
        (
            generator.multinomial(seeds, np.full(seeds, 1 / seeds)),
            generator.multinomial(items, np.full(items, 1 / items)),
        )
        for _ in range(_DRAWS)
    ]
