"""Level and power of the limit of negative flips and of required slices, and what leakage hides.

    python -m benchmarks.claims

The figures of negative flips and of leakage are exact. Those of slices come from 100,000 simulated
adapters per row: a suite of 1,000 items has a slice of 200 items, and 20 % of all items are
discordant. The benchmark takes a few seconds. Its tables are in docs/statistics.md.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, norm

from benchmarks.sequential import fixed_size_power
from trans_peft.validation.statistics.clusters import ClusterCounts
from trans_peft.validation.statistics.intervals import score_statistic

MARGIN, ALPHA, LIMIT, DISCORDANT = 0.05, 0.05, 0.04, 0.2
SUITE, SLICE = 1000, 200


class FlipRates(NamedTuple):
    """Probabilities that the share of negative flips is shown to lie below or above the limit."""

    below: float
    above: float


def flip_rates(n: int, share: float) -> FlipRates:
    """Return the exact rates for `n` items with a true share of negative flips.

    The level of the test "above" is `ALPHA / 2`, as for one suite.
    """
    below, above = _decisions(n)
    p = binom.pmf(np.arange(n + 1), n, share)
    return FlipRates(float(p[below].sum()), float(p[above].sum()))


@cache
def _decisions(n: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return for 0 to n negative flips whether their share is shown to lie below or above."""
    by_count = [
        ClusterCounts(np.ones(n), (np.arange(n) < b).astype(float), np.zeros(n))
        for b in range(n + 1)
    ]
    return (
        np.array([found.largest_loss_share(ALPHA) < LIMIT for found in by_count]),
        np.array([found.smallest_loss_share(ALPHA / 2) > LIMIT for found in by_count]),
    )


class SliceRates(NamedTuple):
    """Shares of adapters that are non-inferior on the suite, and on its slice as well."""

    suite: float
    suite_and_slice: float


def slice_rates(loss_on_slice: float, *, adapters: int, seed: int = 0) -> SliceRates:
    """Simulate adapters that lost `loss_on_slice` on the slice and nothing on other items."""
    rng = np.random.default_rng(seed)

    def drawn(n: int, loss: float) -> tuple[np.ndarray, np.ndarray]:
        worse, better = (DISCORDANT + loss) / 2, (DISCORDANT - loss) / 2
        losses, gains, _ = rng.multinomial(n, [worse, better, 1 - worse - better], adapters).T
        return losses, gains

    (b, c), (other_b, other_c) = drawn(SLICE, loss_on_slice), drawn(SUITE - SLICE, 0.0)
    z = norm.isf(ALPHA)
    suite = score_statistic(SUITE, b + other_b, c + other_c, -MARGIN) > z
    on_slice = score_statistic(SLICE, b, c, -MARGIN) > z
    return SliceRates(float(suite.mean()), float((suite & on_slice).mean()))


def leakage_rate(leaked: float, loss: float) -> float:
    """Return the exact probability of non-inferiority on 500 items.

    A share `leaked` of the items was seen in training, and their answers do not change. The true
    loss on other questions is `loss`, and 20 % of their items are discordant.
    """
    seen = 1 - leaked
    return fixed_size_power(500, seen * DISCORDANT, seen * loss)[0]


def main() -> None:
    print("| items | true share of negative flips | shown below 4 | shown above 4 |")
    print("| -- | -- | -- | -- |")
    for n in (200, 500, 1000):
        for share in (0.01, 0.02, 0.04, 0.06, 0.08):
            found = flip_rates(n, share)
            print(f"| {n} | {share:.0%} | {100 * found.below:.0f} % | {100 * found.above:.0f} % |")
    print("\n| true loss on the slice | suite alone | suite and slice |")
    print("| -- | -- | -- |")
    for points in (0, 5, 10, 15):
        rates = slice_rates(points / 100, adapters=100_000)
        print(f"| {points} | {100 * rates.suite:.0f} % | {100 * rates.suite_and_slice:.1f} % |")
    print("\n| leaked items | passed, loss of 5 points | passed, loss of 7 points |")
    print("| -- | -- | -- |")
    for leaked in (0.0, 0.02, 0.1, 0.3, 0.5):
        at_5, at_7 = (100 * leakage_rate(leaked, loss) for loss in (0.05, 0.07))
        print(f"| {100 * leaked:.0f} % | {at_5:.1f} % | {at_7:.1f} % |")


if __name__ == "__main__":
    main()
