"""Means over runs and items, intervals that resample both, and the p-values of table 3.

The score of an adapter varies with its run (the seed, or the order of rows) and with the choice of
items. Both are resampled with replacement, in the same way for every arm, because all arms share
them. This is a bootstrap of a crossed design; Owen 2007, "The pigeonhole bootstrap", shows that its
intervals tend to be too wide. With few runs the intervals are coarse; with one run they contain
the choice of items alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

__all__ = ["Interval", "paired_p", "resampled", "right"]

_DRAWS = 4_000
_LEVEL = 0.95
_ROWS = 500  # draws at a time, which bounds the memory for suites of 10,000 items


@dataclass(frozen=True)
class Interval:
    """An estimate in points and the middle 95 % of its resampled values."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: np.ndarray) -> "Interval":
        """Return the interval of a statistic that was computed from `resampled` scores."""
        tail = (1 - _LEVEL) / 2
        low, high = np.nanquantile(draws[1:], [tail, 1 - tail])
        return cls(float(draws[0]), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.value:+.1f} ({self.low:+.1f}, {self.high:+.1f})"

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def right(answers: Sequence[str]) -> np.ndarray:
    """Return the results of several runs as an array (runs, items) of 0 and 1.

    Each run is a text of "1" for a right and "0" for a wrong answer, in the order of the items.
    """
    return np.array([[mark == "1" for mark in run] for run in answers], dtype=float)


def resampled(results: Sequence[np.ndarray]) -> np.ndarray:
    """Return an arm's mean score over suites, in points: the estimate, then 4,000 draws of it.

    `results` has an array (runs, items) for each suite. The draws are the same in every call with
    the same shapes, so that the draws of two arms can be subtracted or divided. A draw takes the
    same runs in every suite, and items of each suite separately.
    """
    by_run, by_item = _draws(len(results[0]), tuple(array.shape[1] for array in results))
    scores = np.zeros(_DRAWS + 1)
    for array, drawn in zip(results, by_item, strict=True):
        runs, items = array.shape
        # Counts, divided last: sums of whole numbers are the same on every machine.
        counts = np.concatenate(
            [drawn[at : at + _ROWS] @ array.T for at in range(0, len(drawn), _ROWS)]
        )
        scores += 100 * (by_run * counts).sum(axis=1) / (runs * items)
    return scores / len(results)


@lru_cache(maxsize=8)
def _draws(runs: int, items: tuple[int, ...]) -> tuple[np.ndarray, Sequence[np.ndarray]]:
    """Return how often each draw takes each run and each item. The first takes all of them once."""
    generator = np.random.default_rng(0)
    first, *others = items
    by_run, by_item = np.ones((_DRAWS + 1, runs)), np.ones((_DRAWS + 1, first), np.uint16)
    for draw in range(1, _DRAWS + 1):
        by_run[draw] = generator.multinomial(runs, np.full(runs, 1 / runs))
        by_item[draw] = generator.multinomial(first, np.full(first, 1 / first))
    drawn = [by_item]
    for number, count in enumerate(others, start=1):
        sampled = np.random.default_rng(number).multinomial(
            count, np.full(count, 1 / count), size=_DRAWS
        )
        drawn.append(np.concatenate([np.ones((1, count)), sampled]).astype(np.uint16))
    return by_run, drawn


def paired_p(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Return the two-sided p-value of the paired t test between the runs of two arms.

    `ours` and `theirs` are scores of the same runs. The paper does not name its test. None for
    fewer than two runs, or if all differences are equal.
    """
    from scipy.stats import ttest_rel

    differences = np.subtract(ours, theirs)
    if len(differences) < 2 or np.ptp(differences) == 0:
        return None
    return float(ttest_rel(ours, theirs).pvalue)
