"""Bounds for the mean change of a score with degrees, such as chrF or F1, from 0 to 1.

The changes of the items lie in [-1, 1] and have no known distribution, so there is no score test.
The bounds come from betting on all items (`trans_peft.validation.statistics.betting`), which
assumes nothing but the range. Items of one cluster are one bet. The items are observed in a seeded
order that does not depend on any result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from trans_peft.validation.statistics.betting import BettingTest
from trans_peft.validation.statistics.order import SuiteClusters

__all__ = ["DegreeChanges"]

_SIMULATIONS = 500


@dataclass(frozen=True, eq=False)
class DegreeChanges:
    """Changes of the scores of a suite's items, in the order in which they are bet on.

    Attributes:
        changes: score after minus score before, each in [-1, 1].
        of_suite: the clusters of the items.
        effect: smallest excess over a threshold that the bets should detect: the margin.
    """

    changes: Sequence[float]
    of_suite: SuiteClusters
    effect: float

    @property
    def items(self) -> int:
        """Number of items."""
        return len(self.changes)

    @property
    def clusters(self) -> int:
        """Number of clusters."""
        return self.of_suite.count

    @property
    def are_single(self) -> bool:
        """Whether no cluster has two items."""
        return self.clusters == self.items

    @property
    def discordant(self) -> int:
        """Number of items whose score changed."""
        return sum(change != 0 for change in self.changes)

    @property
    def points(self) -> float:
        """Mean change, in points."""
        return 100 * float(np.mean(self.changes))

    @cached_property
    def _bets(self) -> NDArray[np.float64]:
        """Means and weights of the clusters, shape (clusters, 2)."""
        return np.asarray(self.of_suite.bets(self.changes), dtype=np.float64)

    def design_effect(self, difference: float) -> float:
        """Return the variance relative to independent items, under a hypothesis; at least 1."""
        centered = np.asarray(self.changes) - difference
        sums = np.bincount(self.of_suite.numbers, weights=centered)
        variance = float(np.sum(centered**2))
        return max(1.0, float(np.sum(sums**2)) / variance) if variance else 1.0

    def lower_bound(self, alpha: float) -> float:
        """Return the one-sided lower confidence bound of the mean change at level `alpha`.

        It lies at -effect or above exactly if the test of that threshold is significant.
        """
        return self.of_suite.lower_limit(
            self.changes, -self.effect, alpha, self.effect, unit_steps=False
        )

    def upper_bound(self, alpha: float) -> float:
        """Return the one-sided upper confidence bound (see `lower_bound`)."""
        return -self._negated.lower_bound(alpha)

    @property
    def _negated(self) -> "DegreeChanges":
        return DegreeChanges([-change for change in self.changes], self.of_suite, self.effect)

    def power_of_non_inferiority(self, margin: float, alpha: float) -> float:
        """Return the probability that `lower_bound` exceeds -margin if nothing was lost.

        Simulated 500 times with a fixed seed: the changes are drawn from the observed ones, less
        their mean. The result is accurate to about 4 points.
        """
        means, weights = self._bets.T
        centered = np.clip(means - np.sum(means * weights) / np.sum(weights), -1, 1)
        drawn = np.random.default_rng(0).integers(0, self.clusters, (self.clusters, _SIMULATIONS))
        betting_test = BettingTest(
            np.full(_SIMULATIONS, -margin),
            items=self.clusters,
            alpha=alpha,
            effect=margin * self.of_suite.mean_weight,
            unit_steps=False,
        )
        for chosen in drawn:
            betting_test.observe(centered[chosen], weights[chosen])
        return float(np.mean(betting_test.is_significant))

    def items_to_decide(self, difference: float, alpha: float) -> int:
        """Return the number of items at which a bound excludes `difference` with a power of 80 %.

        Assumes that the true mean and variance are the observed ones, and the power of the test of
        a normal mean, which betting approaches. Never less than the items.
        """
        gap = max(abs(self.points / 100 - difference), 0.5 / self.items)
        variance = float(np.var(self.changes)) * self.design_effect(difference)
        z = float(norm.isf(alpha) + norm.ppf(0.8))
        return max(self.items, ceil(variance * (z / gap) ** 2))
