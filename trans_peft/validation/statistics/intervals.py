"""Score bounds for the difference of two paired proportions, and the power that goes with them.

After T. Tango, "Equivalence test and confidence interval for the difference in proportions for the
paired-sample design", Statistics in Medicine 17 (1998) 891-908. What differs: the bounds are
one-sided, each at its own level, and power is summed over the exact distribution.

The counts, everywhere below: `n` pairs, of which `b` are right only before a change and `c` right
only after it. The difference is D = (c - b) / n, a proportion in [-1, 1], positive where it is
better after. `margin` and `difference` are proportions too: 5 points are 0.05.
"""

from math import ceil, log2

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
    "upper_bound",
]

_OPEN = 1 - 1e-12  # T is defined strictly inside (-1, 1)


def score_statistic(n: float, b: ArrayLike, c: ArrayLike, difference: float) -> NDArray[np.float64]:
    """Return Tango's T for the hypothesis that D is `difference`, elementwise over `b` and `c`.

    In large samples T is standard normal under the hypothesis; it falls as `difference` grows from
    -1 to 1 (both excluded), and is infinite where the hypothesis allows no variance and the counts
    contradict it. With the same shares among more pairs it grows as the root of their number.
    """
    b, c = np.asarray(b, dtype=np.float64), np.asarray(c, dtype=np.float64)
    # q, the likeliest P(right only before) among all tables with this difference, is the larger
    # root of 2n q^2 + linear q - constant = 0, written so that no digits cancel for either sign.
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
            "counts of pairs that cannot be",
            expected="n >= 1, b >= 0, c >= 0, b + c <= n",
            found=f"n={n}, b={b}, c={c}",
        )
    if not 0 < alpha < 0.5:
        raise InvalidSpecError("alpha must lie in (0, 0.5)", found=alpha)


def lower_bound(n: int, b: int, c: int, alpha: float) -> float:
    """Return the one-sided lower bound of D: it lies above the true D with a chance of `alpha`."""
    _check(n, b, c, alpha)
    if b == n:
        return -1.0
    z = float(norm.isf(alpha))
    estimate = min((c - b) / n, _OPEN)
    return float(brentq(lambda d: float(score_statistic(n, b, c, d)) - z, -_OPEN, estimate))


def upper_bound(n: int, b: int, c: int, alpha: float) -> float:
    """Return the one-sided upper bound of D: the mirror of `lower_bound` with the pair swapped."""
    return -lower_bound(n, c, b, alpha)


def power_of_non_inferiority(n: int, discordant_share: float, margin: float, alpha: float) -> float:
    """Return the chance that `lower_bound` lies above -margin when nothing was lost (D = 0).

    Exact for the test: the number of discordant pairs is Binomial(n, discordant_share), and each
    falls either way with chance 1/2.
    """
    _check(n, 0, 0, alpha)
    if not (0 <= discordant_share <= 1 and 0 < margin < 1):
        raise InvalidSpecError(
            "power needs a share in [0, 1] and a margin in (0, 1)",
            found=f"discordant_share={discordant_share}, margin={margin}",
        )
    z = norm.isf(alpha)
    discordant = np.arange(
        binom.ppf(1e-12, n, discordant_share), binom.isf(1e-12, n, discordant_share) + 1
    )
    # For each number of discordant pairs, the fewest gains that pass: T rises with every gain.
    too_few, enough = np.full_like(discordant, -1), discordant + 1
    for _ in range(ceil(log2(n + 2)) + 1):
        gains = np.clip((too_few + enough) // 2, 0, discordant)
        passes = score_statistic(n, discordant - gains, gains, -margin) > z
        open_ = enough - too_few > 1
        enough = np.where(open_ & passes, gains, enough)
        too_few = np.where(open_ & ~passes, gains, too_few)
    weights = binom.pmf(discordant, n, discordant_share)
    return float(np.sum(weights * binom.sf(enough - 1, discordant, 0.5)))


def items_to_decide(
    n: int, b: int, c: int, difference: float, alpha: float, *, power: float = 0.8
) -> int:
    """Return how many items in all put the bound at `alpha` clear of `difference`.

    Assumes that the true shares are those seen, and asks for a chance of `power`: T grows with the
    root of the number of pairs, so it must reach z(alpha) + z(power). A result closer to
    `difference` than half an item is taken to be half an item away; the answer is then large.
    """
    _check(n, b, c, alpha)
    surplus = c - b - n * difference
    gains = c + 0.5 - surplus if abs(surplus) < 0.5 else c
    t = abs(float(score_statistic(n, b, gains, difference)))
    wanted = float(norm.isf(alpha) + norm.ppf(power))
    return max(n, ceil(n * (wanted / t) ** 2))
