"""Bounds for the change of the share of right answers, from the marks of a judge model.

A judge model that confuses right and wrong answers makes every change look smaller. If it marks
right answers with r and wrong ones with w on average, a change of the share of right answers by d
changes the mean mark by (r - w) d, as in the estimate of a prevalence by an imperfect test (Rogan
and Gladen 1978). r - w is the slope. It is estimated from answers that people labeled.

The only assumption: given that an answer is right (or wrong), its mean mark on both sides of the
comparison is that of the labeled answers. A constant bias of the marks, which prediction-powered
inference for a mean (Angelopoulos et al. 2023) subtracts, cancels in a difference of two sides.

All bounds hold for any number of items and labels. A share of the level is that of the slope.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log

from scipy.optimize import brentq
from scipy.special import rel_entr

from trans_peft.validation.statistics.degrees import DegreeChanges

__all__ = ["MARK_LEVEL", "JudgedChanges", "LabeledMarks"]

MARK_LEVEL = 0.8
"""The share of a test's level that the bounds of the mean mark have. The slope has the rest."""


@dataclass(frozen=True)
class LabeledMarks:
    """A judge model's marks, from 0 to 1, of answers that people labeled.

    Attributes:
        right: marks of answers that are right.
        wrong: marks of answers that are wrong.
    """

    right: Sequence[float]
    wrong: Sequence[float]

    @classmethod
    def of(cls, labeled: Iterable[tuple[bool, float]]) -> "LabeledMarks":
        """Return the marks of (label, mark) pairs; a label is whether the answer is right."""
        pairs = tuple(labeled)
        return cls([m for right, m in pairs if right], [m for right, m in pairs if not right])

    @cached_property
    def slope(self) -> float:
        """Mean mark of right answers, less that of wrong ones."""
        return sum(self.right) / len(self.right) - sum(self.wrong) / len(self.wrong)

    def slope_bounds(self, alpha: float) -> tuple[float, float]:
        """Return the one-sided lower and upper confidence bounds of the slope at level `alpha`."""
        low = _lower_mean(self.right, alpha / 2) - _upper_mean(self.wrong, alpha / 2)
        high = _upper_mean(self.right, alpha / 2) - _lower_mean(self.wrong, alpha / 2)
        return low, high


@dataclass(frozen=True, eq=False)
class JudgedChanges(DegreeChanges):
    """Changes of the marks of a suite's items, as changes of the share of right answers.

    `effect` is the margin, as a share of right answers.
    """

    labeled: LabeledMarks

    @property
    def points(self) -> float:
        """Estimated change of the share of right answers, in points."""
        estimate = self._marks(1.0).points / self.labeled.slope
        return max(min(estimate, 100.0), -100.0)

    def lower_bound(self, alpha: float) -> float:
        """Return the one-sided lower confidence bound of the change at level `alpha`.

        -1 if the slope is not shown to be positive at its share of the level.
        """
        low, high = self.labeled.slope_bounds((1 - MARK_LEVEL) * alpha)
        if low <= 0:
            return -1.0
        bound = self._marks(low).lower_bound(MARK_LEVEL * alpha)
        return max(bound / (low if bound < 0 else high), -1.0)

    @property
    def _negated(self) -> "JudgedChanges":
        negated = [-change for change in self.changes]
        return JudgedChanges(negated, self.of_suite, self.effect, self.labeled)

    def power_of_non_inferiority(self, margin: float, alpha: float) -> float:
        """Return the probability that `lower_bound` exceeds -margin if nothing was lost."""
        low, _ = self.labeled.slope_bounds((1 - MARK_LEVEL) * alpha)
        if low <= 0:
            return 0.0
        return self._marks(low).power_of_non_inferiority(margin * low, MARK_LEVEL * alpha)

    def items_to_decide(self, difference: float, alpha: float) -> int:
        """Return the number of items at which a bound excludes `difference` with a power of 80 %.

        For the labels that there are. 0 if they do not show that the slope is positive.
        """
        low, _ = self.labeled.slope_bounds((1 - MARK_LEVEL) * alpha)
        if low <= 0:
            return 0
        return self._marks(low).items_to_decide(difference * low, MARK_LEVEL * alpha)

    def _marks(self, slope: float) -> DegreeChanges:
        """Return the changes of the marks, with the margin in marks for a given slope."""
        return DegreeChanges(self.changes, self.of_suite, self.effect * slope)


def _lower_mean(values: Sequence[float], alpha: float) -> float:
    """Return the one-sided lower confidence bound of the mean of values from 0 to 1.

    Source: W. Hoeffding, "Probability inequalities for sums of bounded random variables", JASA 58
    (1963) 13-30, eq. 2.1. The values are independent, and may have any distribution.
    """
    mean = sum(values) / len(values)
    least = -log(alpha) / len(values)

    def excess(expected: float) -> float:
        return float(rel_entr(mean, expected) + rel_entr(1 - mean, 1 - expected)) - least

    smallest = 1e-12
    if mean <= smallest or excess(smallest) <= 0:
        return 0.0
    return float(brentq(excess, smallest, mean))


def _upper_mean(values: Sequence[float], alpha: float) -> float:
    return 1 - _lower_mean([1 - value for value in values], alpha)
