"""What early decisions cost and save: 10,000 simulated adapters for each line of two tables.

    python -m benchmarks.sequential [--adapters 10000]

Each adapter is judged by the very claims of `trans_peft.validation.statistics.sequential`, looked
at after each batch, on one suite and without the bare base; the fixed-size figures are exact. The
loss of an adapter is that of the population; its items are drawn anew for each. Takes under a
minute of one core. The tables stand in docs/verdicts.md.
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
class Shares:
    """What became of the adapters, as shares of them, and how many items one was asked."""

    passed: float
    retuned: float
    asked: float


def changes(n: int, adapters: int, discordant: float, loss: float, seed: int) -> NDArray[np.int8]:
    """Return x of shape (n, adapters): -1 with chance (discordant + loss) / 2, and so on."""
    draws = np.random.default_rng(seed).random((n, adapters), dtype=np.float32)
    worse = (discordant + loss) / 2
    return np.where(draws < worse, -1, np.where(draws < discordant, 1, 0)).astype(np.int8)


def simulate(n: int, discordant: float, loss: float, *, adapters: int, seed: int = 0) -> Shares:
    """Judge adapters that lost `loss`, batch after batch, until each is decided or given up."""
    non_inferior = BettingTest(-MARGIN, items=n, alpha=ALPHA, effect=MARGIN)
    inferior = BettingTest(MARGIN, items=n, alpha=ALPHA, effect=MARGIN)
    ends = {min(end, n) for end in batch_ends(n)}
    asked = np.zeros(adapters, dtype=np.int64)
    passed, retuned = np.zeros(adapters, dtype=bool), np.zeros(adapters, dtype=bool)
    for i, x in enumerate(changes(n, adapters, discordant, loss, seed), start=1):
        non_inferior.observe(x)
        inferior.observe(-x)
        if i in ends:
            stops = (asked == 0) & (
                non_inferior.is_significant
                | inferior.is_significant
                | ~(non_inferior.open | inferior.open)
            )
            asked[stops] = i
            passed |= stops & non_inferior.is_significant
            retuned |= stops & inferior.is_significant & ~non_inferior.is_significant
        if asked.all():
            break
    return Shares(float(passed.mean()), float(retuned.mean()), float(asked.mean()))


def fixed(n: int, discordant: float, loss: float) -> tuple[float, float]:
    """Return the exact chances that all n items show the loss to be smaller, and larger."""
    b, c = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    worse, better = (discordant + loss) / 2, (discordant - loss) / 2
    p = binom.pmf(b, n, worse) * binom.pmf(c, np.maximum(n - b, 0), better / (1 - worse))
    with np.errstate(invalid="ignore"):
        t = np.where(b + c <= n, score_statistic(n, b, np.minimum(c, n - b), -MARGIN), 0.0)
    z = norm.isf(ALPHA)
    return float(p[t > z].sum()), float(p[t < -z].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=10_000)
    adapters = parser.parse_args().adapters
    print("| items | discordant | passed at a loss of 5 | passed at no loss | all items | asked |")
    print("|---|---|---|---|---|---|")
    for n in (200, 500, 1319):
        for discordant in (0.05, 0.1, 0.2):
            at_margin = simulate(n, discordant, MARGIN, adapters=adapters, seed=1)
            at_none = simulate(n, discordant, 0.0, adapters=adapters, seed=2)
            power = power_of_non_inferiority(n, discordant, MARGIN, ALPHA)
            print(
                f"| {n} | {discordant:.0%} | {at_margin.passed:.1%} | {at_none.passed:.0%} "
                f"| {power:.0%} | {at_none.asked:.0f} ({at_none.asked / n:.0%}) |",
                flush=True,
            )
    n, discordant = 500, 0.2
    print("\n| true loss | smaller | larger | asked | all items: smaller | larger |")
    print("|---|---|---|---|---|---|")
    for points in (-5, 0, 2, 4, 5, 7, 10, 15):
        early = simulate(n, discordant, points / 100, adapters=adapters, seed=3)
        smaller, larger = fixed(n, discordant, points / 100)
        print(
            f"| {points} | {early.passed:.0%} | {early.retuned:.0%} | {early.asked:.0f} "
            f"({early.asked / n:.0%}) | {smaller:.0%} | {larger:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
