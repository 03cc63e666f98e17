"""Tango's score bounds for the difference of two paired proportions, and their power.

Source: T. Tango, "Equivalence test and confidence interval for the difference in proportions for
the paired-sample design", Statistics in Medicine 17 (1998) 891-908. Here the bounds are one-sided,
each at its own level, and the power is summed over the exact distribution.

All functions use the same counts: `n` pairs of results, `b` that are correct only before a change,
and `c` that are correct only after it. The difference is D = (c - b) / n, a proportion in [-1, 1];
it is positive if more results are correct after the change. `margin` and `difference` are
proportions as well: 5 points are 0.05.
"""

from math import ceil, log2, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import binom, norm

from trans_peft.errors import InvalidSpecError

__all__ = [
    "items_to_decide",
    "lower_bound",
    "power_of_non_inferiority",
    "score_statistic",
    "smallest_sample",
    "upper_bound",
]

_LIMIT = 1 - 1e-12  # T is defined strictly inside (-1, 1)


def score_statistic(n: float, b: ArrayLike, c: ArrayLike, difference: float) -> NDArray[np.float64]:
    """Return Tango's statistic T for the hypothesis D = `difference`, elementwise over `b` and `c`.

    Under the hypothesis, T is approximately standard normal for large n. T falls as `difference`
    grows from -1 to 1 (both excluded). T is infinite if the hypothesis allows no variance and the
    counts contradict it. For constant b / n and c / n, T is proportional to the square root of n.
    """
    b, c = np.asarray(b, dtype=np.float64), np.asarray(c, dtype=np.float64)
    # q is the maximum likelihood estimate of P(correct only before) under the hypothesis. It is the
    # larger root of 2n q^2 + linear q - constant = 0, written so that no sign causes cancellation.
    linear = (2 * n + b - c) * difference - (b + c)
    constant = b * difference * (1 - difference)
    root = np.sqrt(np.maximum(linear**2 + 8 * n * constant, 0.0))
    surplus = c - b - n * difference
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(linear > 0, 2 * constant / (linear + root), (root - linear) / (4 * n))
        variance = np.maximum(n * (2 * q + difference * (1 - difference)), 0.0)
        return np.where(surplus == 0, 0.0, surplus / np.sqrt(variance))


def _check(n: int, b: int, c: int, alpha: float) -> None:
    if n < 1 or b < 0 or c < 0 or b + c > n:
        raise InvalidSpecError(
            "the counts of pairs are inconsistent",
            expected="n >= 1, b >= 0, c >= 0, b + c <= n",
            found=f"n={n}, b={b}, c={c}",
        )
    if not 0 < alpha < 0.5:
        raise InvalidSpecError("alpha must lie in (0, 0.5)", found=alpha)


def lower_bound(n: int, b: int, c: int, alpha: float) -> float:
    """Return the one-sided lower confidence bound of D at level `alpha`.

    The bound lies above the true D with a probability of about `alpha`. It is -1 if `b` equals `n`.

    Raises:
        InvalidSpecError: the counts are inconsistent, or `alpha` is not in (0, 0.5).
    """
    _check(n, b, c, alpha)
    if b == n:
        return -1.0
    z = float(norm.isf(alpha))
    estimate = min((c - b) / n, _LIMIT)
    return float(brentq(lambda d: float(score_statistic(n, b, c, d)) - z, -_LIMIT, estimate))


def upper_bound(n: int, b: int, c: int, alpha: float) -> float:
    """Return the one-sided upper confidence bound of D at level `alpha` (see `lower_bound`)."""
    return -lower_bound(n, c, b, alpha)


def power_of_non_inferiority(n: int, discordant_share: float, margin: float, alpha: float) -> float:
    """Return the probability that `lower_bound` lies above -margin if nothing was lost (D = 0).

    The probability is exact: the number of discordant pairs is Binomial(n, discordant_share), and
    each of them is a loss or a gain with probability 1/2.

    Raises:
        InvalidSpecError: n < 1, or the share, the margin or `alpha` is outside its range.
    """
    _check(n, 0, 0, alpha)
    if not (0 <= discordant_share <= 1 and 0 < margin < 1):
        raise InvalidSpecError(
            "the power cannot be computed",
            expected="discordant_share in [0, 1], margin in (0, 1)",
            found=f"discordant_share={discordant_share}, margin={margin}",
        )
    z = norm.isf(alpha)
    discordant = np.arange(
        binom.ppf(1e-12, n, discordant_share), binom.isf(1e-12, n, discordant_share) + 1
    )
    # Binary search for the smallest number of gains that passes, for each number of discordant
    # pairs. T rises with every gain.
    too_few, enough = np.full_like(discordant, -1), discordant + 1
    for _ in range(ceil(log2(n + 2)) + 1):
        gains = np.clip((too_few + enough) // 2, 0, discordant)
        passes = score_statistic(n, discordant - gains, gains, -margin) > z
        searching = enough - too_few > 1
        enough = np.where(searching & passes, gains, enough)
        too_few = np.where(searching & ~passes, gains, too_few)
    weights = binom.pmf(discordant, n, discordant_share)
    return float(np.sum(weights * binom.sf(enough - 1, discordant, 0.5)))


def smallest_sample(margin: float, alpha: float) -> int:
    """Return the smallest number of items of which any result can show non-inferiority.

    It is that of a sample without discordant items, whose lower bound is -z^2 / (n + z^2).
    """
    z = float(norm.isf(alpha))
    return int(z * z * (1 - margin) / margin) + 1


def items_to_decide(  # noqa: PLR0913  the counts, the test and its assumptions
    n: int,
    b: int,
    c: int,
    difference: float,
    alpha: float,
    *,
    power: float = 0.8,
    design_effect: float = 1.0,
) -> int:
    """Return the total number of items at which a bound excludes `difference` with `power`.

    The bound is the one at level `alpha` on the side of the observed difference. Assumes that the
    true shares are the observed ones. T is proportional to the square root of n, so it must reach
    z(alpha) + z(power). An observed difference closer than half an item to `difference` counts as
    half an item away; the result is then very large. Never returns less than `n`. `design_effect`
    is the variance of the statistic relative to independent items.
    """
    _check(n, b, c, alpha)
    surplus = c - b - n * difference
    gains = c + 0.5 - surplus if abs(surplus) < 0.5 else c
    t = abs(float(score_statistic(n, b, gains, difference)))
    required_t = float(norm.isf(alpha) + norm.ppf(power)) * sqrt(design_effect)
    return max(n, ceil(n * (required_t / t) ** 2))
