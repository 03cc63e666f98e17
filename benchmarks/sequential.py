"""Power and saved items of the sequential gate, from 10,000 simulated adapters per table row.

    python -m benchmarks.sequential [--adapters 10000]
    python -m benchmarks.sequential --level

Each adapter is judged on one suite by the betting tests against its old base, which are examined
after each batch as in `trans_peft.validation.statistics.sequential`. The figures of the fixed-size
test are exact. The loss of an adapter is that of the population, from which its items are drawn.
The benchmark takes less than a minute on one core. Its tables are in docs/verdicts.md.

`--level` prints the exact level of the fixed-size test instead: the largest probability that a loss
equal to the margin passes, over 50 to 500 items. This takes a minute as well.
"""

import argparse
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, norm

from trans_peft.validation.statistics.betting import BettingTest
from trans_peft.validation.statistics.intervals import power_of_non_inferiority, score_statistic
from trans_peft.validation.statistics.sequential import batch_ends

MARGIN, ALPHA = 0.05, 0.05


@dataclass(frozen=True)
class Outcomes:
    """Results of simulated adapters.

    Attributes:
        passed: share of adapters that were shown to be non-inferior.
        inferior: share of adapters that were shown to be inferior.
        mean_items: mean number of items per adapter.
    """

    passed: float
    inferior: float
    mean_items: float


def changes(n: int, adapters: int, discordant: float, loss: float, seed: int) -> NDArray[np.int8]:
    """Return results of shape (n, adapters): -1 for a loss, 1 for a gain, else 0.

    `discordant` is the probability that an item is discordant, `loss` the expected loss; both are
    proportions.
    """
    draws = np.random.default_rng(seed).random((n, adapters), dtype=np.float32)
    worse = (discordant + loss) / 2
    return np.where(draws < worse, -1, np.where(draws < discordant, 1, 0)).astype(np.int8)


def simulate(n: int, discordant: float, loss: float, *, adapters: int, seed: int = 0) -> Outcomes:
    """Simulate adapters with a true loss of `loss` until their tests are significant or futile."""
    non_inferior_test = BettingTest(-MARGIN, items=n, alpha=ALPHA, effect=MARGIN)
    inferior_test = BettingTest(MARGIN, items=n, alpha=ALPHA, effect=MARGIN)
    ends = {min(end, n) for end in batch_ends(n)}
    items = np.zeros(adapters, dtype=np.int64)  # 0 while an adapter is undecided
    passed, inferior = np.zeros(adapters, dtype=bool), np.zeros(adapters, dtype=bool)
    for i, x in enumerate(changes(n, adapters, discordant, loss, seed), start=1):
        non_inferior_test.observe(x)
        inferior_test.observe(-x)
        if i in ends:
            stops = (items == 0) & (
                non_inferior_test.is_significant
                | inferior_test.is_significant
                | ~(non_inferior_test.is_undecided | inferior_test.is_undecided)
            )
            items[stops] = i
            passed |= stops & non_inferior_test.is_significant
            inferior |= stops & inferior_test.is_significant & ~non_inferior_test.is_significant
        if items.all():
            break
    return Outcomes(float(passed.mean()), float(inferior.mean()), float(items.mean()))


def fixed_size_power(n: int, discordant: float, loss: float) -> tuple[float, float]:
    """Return the exact probabilities that n items show non-inferiority, and inferiority."""
    b, c = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    worse, better = (discordant + loss) / 2, (discordant - loss) / 2
    p = binom.pmf(b, n, worse) * binom.pmf(c, np.maximum(n - b, 0), better / (1 - worse))
    with np.errstate(invalid="ignore"):
        t = np.where(b + c <= n, score_statistic(n, b, np.minimum(c, n - b), -MARGIN), 0.0)
    z = norm.isf(ALPHA)
    return float(p[t > z].sum()), float(p[t < -z].sum())


def print_levels() -> None:
    largest: dict[float, tuple[float, int]] = {}
    for n in range(50, 501):
        b, c = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
        possible = b + c <= n
        b, c = b[possible], c[possible]
        passes = score_statistic(n, b, c, -MARGIN) > norm.isf(ALPHA)
        b, c = b[passes], c[passes]
        for discordant in (MARGIN + 1e-5, 0.06, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5):
            worse, better = (discordant + MARGIN) / 2, (discordant - MARGIN) / 2
            p = binom.pmf(b, n, worse) * binom.pmf(c, n - b, better / (1 - worse))
            largest[discordant] = max(largest.get(discordant, (0.0, 0)), (float(p.sum()), n))
    print("| discordant | largest pass rate at a loss of 5 | at items |")
    print("| -- | -- | -- |")
    for discordant, (level, n) in largest.items():
        print(f"| {discordant:.0%} | {level:.1%} | {n} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--level", action="store_true", help="print the fixed-size test's level")
    arguments = parser.parse_args()
    if arguments.level:
        print_levels()
        return
    adapters = arguments.adapters
    print("| items | discordant | passed, loss 5 | passed, loss 0 | fixed size | items, loss 0 |")
    print("|---|---|---|---|---|---|")
    for n in (200, 500, 1319):
        for discordant in (0.05, 0.1, 0.2):
            at_margin = simulate(n, discordant, MARGIN, adapters=adapters, seed=1)
            at_none = simulate(n, discordant, 0.0, adapters=adapters, seed=2)
            power = power_of_non_inferiority(n, discordant, MARGIN, ALPHA)
            print(
                f"| {n} | {discordant:.0%} | {at_margin.passed:.1%} | {at_none.passed:.0%} "
                f"| {power:.0%} | {at_none.mean_items:.0f} ({at_none.mean_items / n:.0%}) |",
                flush=True,
            )
    n, discordant = 500, 0.2
    print("\n| true loss | non-inferior | inferior | items | fixed size: non-inferior | inferior |")
    print("|---|---|---|---|---|---|")
    for points in (-5, 0, 2, 4, 5, 7, 10, 15):
        found = simulate(n, discordant, points / 100, adapters=adapters, seed=3)
        non_inferior, inferior = fixed_size_power(n, discordant, points / 100)
        print(
            f"| {points} | {found.passed:.0%} | {found.inferior:.0%} | {found.mean_items:.0f} "
            f"({found.mean_items / n:.0%}) | {non_inferior:.0%} | {inferior:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
