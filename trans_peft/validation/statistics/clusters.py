"""Bounds for the difference of two paired proportions whose items come in clusters.

Items of one cluster (one document, one customer, one conversation) are often right or wrong
together. A test that treats them as independent passes too many adapters. Here Tango's statistic
(`trans_peft.validation.statistics.intervals`) is divided by the square root of the design effect,
which is the cluster-robust variance divided by the variance of independent items:

    deff(d) = sum over clusters of (sum of x - d)^2 / sum over items of (x - d)^2

Here x is -1, 0 or 1 for an item, and d is the hypothesized difference. Each cluster counts once in
the numerator, whatever the correlation within it. The variance is taken under the hypothesis, as in
a score test.

This variance is too small if few large clusters happen to have no loss and many small ones have
some. The design effect is therefore at least that of Kish for the intra-cluster correlation rho of
all pairs of items in one cluster, with m the number of items of a cluster:

    deff(d) = 1 + rho(d) * (sum of m^2 / sum of m - 1)
    rho(d) = sum over pairs of (x - d) * (x' - d) / sum over pairs of ((x - d)^2 + (x' - d)^2) / 2

Both are equal for clusters of one size. A design effect below 1 counts as 1. The statistic is
compared with Student's distribution of one degree of freedom less than there are effective
clusters, (sum of m)^2 / sum of m^2, which is the number of clusters if all have one size.

Sources: J. N. K. Rao and A. J. Scott, "A simple method for the analysis of clustered binary data",
Biometrics 48 (1992) 577-585 (Tango's statistic on counts that are divided by the design effect is
the statistic used here); A. C. Cameron and D. L. Miller, "A practitioner's guide to cluster-robust
inference", Journal of Human Resources 50 (2015) 317-372 (degrees of freedom); L. Kish, "Survey
sampling", Wiley, 1965 (design effect and effective number for unequal sizes); E. L. Korn and
B. I. Graubard, "Confidence intervals for proportions with small expected number of positive counts
estimated from survey data", Survey Methodology 24 (1998) 193-201 (bounds of a single share: those
of Clopper and Pearson for the effective number of items).

Without a cluster of two items, all functions return the figures of `intervals`.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import beta, norm
from scipy.stats import t as student

from trans_peft.validation.statistics import intervals

__all__ = ["ClusterCounts"]

_GRID = 400
_LIMIT = 1 - 1e-9


@dataclass(frozen=True, eq=False)
class ClusterCounts:
    """Counts of paired results, by cluster.

    Attributes:
        sizes: number of items of each cluster, shape (clusters,).
        losses: items that are right only before a change, by cluster.
        gains: items that are right only after it, by cluster.

    Example:
        >>> counts = ClusterCounts.of([-1, 0, 0, 1], ["a", "a", "b", "c"])
        >>> counts.lower_bound(0.05)
    """

    sizes: NDArray[np.float64]
    losses: NDArray[np.float64]
    gains: NDArray[np.float64]

    @classmethod
    def of(cls, changes: Sequence[int], clusters: Iterable[Hashable]) -> "ClusterCounts":
        """Count changes (-1, 0 or 1) by the cluster of each item."""
        x = np.asarray(changes)
        numbers: dict[Hashable, int] = {}
        cluster = np.array([numbers.setdefault(name, len(numbers)) for name in clusters])

        def by_cluster(chosen: Any) -> NDArray[np.float64]:
            return np.bincount(cluster, weights=chosen).astype(np.float64)

        return cls(by_cluster(np.ones(len(x))), by_cluster(x < 0), by_cluster(x > 0))

    @cached_property
    def totals(self) -> tuple[int, int, int]:
        """Number of items, of losses and of gains."""
        n, b, c = (int(counts.sum()) for counts in (self.sizes, self.losses, self.gains))
        return n, b, c

    @property
    def items(self) -> int:
        """Number of items."""
        return self.totals[0]

    @property
    def clusters(self) -> int:
        """Number of clusters."""
        return len(self.sizes)

    @property
    def effective_clusters(self) -> float:
        """Number of clusters of one size that have the same variance if their items are equal."""
        return float(self.sizes.sum() ** 2 / np.sum(self.sizes**2))

    @property
    def discordant(self) -> int:
        """Number of losses and gains."""
        return self.totals[1] + self.totals[2]

    @property
    def points(self) -> float:
        """Gains minus losses, in points of the items."""
        n, b, c = self.totals
        return 100.0 * (c - b) / n

    @property
    def are_single(self) -> bool:
        """Whether no cluster has two items."""
        return self.clusters == self.items

    def reversed(self) -> "ClusterCounts":
        """Return the counts with losses and gains exchanged."""
        return ClusterCounts(self.sizes, self.gains, self.losses)

    def design_effect(self, difference: ArrayLike) -> NDArray[np.float64]:
        """Return the design effect under the hypothesis D = `difference`, elementwise, at least 1.

        It is 1 if every cluster has one item, and the mean size of an item's cluster if the items
        of each cluster are equal.
        """
        d = np.asarray(difference, dtype=np.float64)
        n, b, c = self.totals
        changes = self.gains - self.losses
        sums = changes - np.multiply.outer(d, self.sizes)
        squares = (
            self.gains
            + self.losses
            - np.multiply.outer(2 * d, changes)
            + np.multiply.outer(d * d, self.sizes)
        )
        variance = (b + c) - 2 * d * (c - b) + n * d * d
        pairs = np.sum(squares * (self.sizes - 1), axis=-1)
        largest = np.sum(self.sizes**2) / n  # the limit for d -> 0 without discordant items
        with np.errstate(divide="ignore", invalid="ignore"):
            effect = np.where(variance > 0, np.sum(sums**2, axis=-1) / variance, largest)
            correlation = np.where(pairs > 0, np.sum(sums**2 - squares, axis=-1) / pairs, 1.0)
        return np.maximum(np.maximum(effect, 1 + correlation * (largest - 1)), 1.0)

    def statistic(self, difference: ArrayLike) -> NDArray[np.float64]:
        """Return the cluster-robust statistic for the hypothesis D = `difference`, elementwise."""
        d = np.atleast_1d(np.asarray(difference, dtype=np.float64))
        n, b, c = self.totals
        t = np.array([float(intervals.score_statistic(n, b, c, float(value))) for value in d])
        return (t / np.sqrt(self.design_effect(d))).reshape(np.shape(difference))

    def quantile(self, probability: float) -> float:
        """Return the quantile that the statistic has to exceed; infinite for a single cluster."""
        if self.are_single:
            return float(norm.isf(probability))
        degrees = self.effective_clusters - 1
        return float(student.isf(probability, degrees)) if self.clusters > 1 else np.inf

    def lower_bound(self, alpha: float) -> float:
        """Return the one-sided lower confidence bound of D at level `alpha`.

        It is the smallest difference that the test does not reject, so a bound above -margin means
        that every loss of at least the margin is rejected. -1 if nothing is rejected.
        """
        n, b, c = self.totals
        if self.are_single:
            return intervals.lower_bound(n, b, c, alpha)
        z = self.quantile(alpha)
        if b == n or z == np.inf:
            return -1.0
        estimate = min((c - b) / n, _LIMIT)
        grid = np.linspace(-_LIMIT, estimate, _GRID)
        excess: Callable[[float], float] = lambda d: float(self.statistic(d)) - z  # noqa: E731
        accepted = int(np.argmax(self.statistic(grid) <= z))
        if accepted == 0:
            return -1.0
        return float(brentq(excess, grid[accepted - 1], grid[accepted]))

    def upper_bound(self, alpha: float) -> float:
        """Return the one-sided upper confidence bound of D at level `alpha` (see `lower_bound`)."""
        return -self.reversed().lower_bound(alpha)

    def power_of_non_inferiority(self, margin: float, alpha: float) -> float:
        """Return the probability that `lower_bound` lies above -margin if nothing was lost.

        Exact for single items. For clusters it is that of as many independent items as have the
        same variance.
        """
        n = int(self.items * self._independent_share(-margin, alpha))
        if n < 1:
            return 0.0
        share = self.discordant / self.items
        return intervals.power_of_non_inferiority(n, share, margin, alpha)

    def items_to_decide(self, difference: float, alpha: float) -> int:
        """Return the number of items at which a bound excludes `difference` (see `intervals`).

        New items are assumed to come in clusters of the same sizes.
        """
        n, b, c = self.totals
        if self.are_single:
            return intervals.items_to_decide(n, b, c, difference, alpha)
        effect = float(self.design_effect(difference))
        needed = intervals.items_to_decide(n, b, c, difference, alpha, design_effect=effect)
        return max(needed, n)

    def largest_loss_share(self, alpha: float, *, limit: float | None = None) -> float:
        """Return the upper confidence bound of the share of losses, at level `alpha`.

        Exact for single items. The design effect is that under the hypothesis "the share is
        `limit`", by default that of the observed share.
        """
        n, b, _ = self.totals
        scale = self._loss_scale(alpha, limit)
        if b == n or scale == 0:
            return 1.0
        return float(beta.isf(alpha, b * scale + 1, (n - b) * scale))

    def smallest_loss_share(self, alpha: float, *, limit: float | None = None) -> float:
        """Return the lower confidence bound of the share of losses (see `largest_loss_share`)."""
        n, b, _ = self.totals
        scale = self._loss_scale(alpha, limit)
        return float(beta.ppf(alpha, b * scale, (n - b) * scale + 1)) if b * scale else 0.0

    def only_losses(self) -> "ClusterCounts":
        """Return the counts without the gains, so that the difference is minus the loss share."""
        return ClusterCounts(self.sizes, self.losses, np.zeros_like(self.gains))

    def _loss_scale(self, alpha: float, limit: float | None) -> float:
        n, b, _ = self.totals
        share = b / n if limit is None else limit
        return self.only_losses()._independent_share(-share, alpha)

    def _independent_share(self, difference: float, alpha: float) -> float:
        """Return the number of independent items with the same variance, per item."""
        if self.are_single:
            return 1.0
        inflation = (self.quantile(alpha) / float(norm.isf(alpha))) ** 2
        return 1 / (float(self.design_effect(difference)) * inflation)
