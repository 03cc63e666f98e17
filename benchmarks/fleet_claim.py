"""False discovery rate of a fleet whose adapters share a suite, with and without e-BH.

    python -m benchmarks.fleet_claim [--fleets 40]

A fleet has 1,000 adapters, judged by betting on the same 500 items, 20 % of them discordant. Some
lost exactly the margin of 5 points (bad), the others nothing. The adapters are dependent: half of
the variance behind an item's change is common to all adapters. The benchmark takes a few minutes on
one core. Its table is in docs/statistics.md.
"""

import argparse
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from trans_peft.validation.statistics.betting import BettingTest
from trans_peft.validation.statistics.e_values import e_bh

MARGIN, ITEMS, DISCORDANT, COMMON, FDR = 0.05, 500, 0.2, 0.5, 0.1


class FleetRates(NamedTuple):
    """Means over simulated fleets.

    Attributes:
        passed: share of the adapters that pass.
        false: share of bad adapters among those that pass; 0 if none passes.
        selected: share of the adapters that e-BH selects.
        false_selected: share of bad adapters among the selected ones, likewise.
    """

    passed: float
    false: float
    selected: float
    false_selected: float


def e_values(adapters: int, bad: int, alpha: float, seed: int) -> NDArray[np.float64]:
    """Return the e-values of one fleet, shape (adapters,). The first `bad` lost the margin."""
    rng = np.random.default_rng(seed)
    loss = np.where(np.arange(adapters) < bad, MARGIN, 0.0)
    worse = norm.ppf((DISCORDANT + loss) / 2)
    better = norm.isf((DISCORDANT - loss) / 2)
    betting_test = BettingTest(np.full(adapters, -MARGIN), items=ITEMS, alpha=alpha, effect=MARGIN)
    for _ in range(ITEMS):
        z = np.sqrt(COMMON) * rng.normal() + np.sqrt(1 - COMMON) * rng.normal(size=adapters)
        betting_test.observe(np.where(z < worse, -1, np.where(z > better, 1, 0)))
    return betting_test.wealth / alpha


def simulate(
    bad_share: float, alpha: float, *, fleets: int, adapters: int = 1000, seed: int = 0
) -> FleetRates:
    """Simulate fleets in which a share `bad_share` of the adapters lost exactly the margin."""
    bad, found = round(bad_share * adapters), []
    for fleet in range(fleets):
        values = e_values(adapters, bad, alpha, seed + fleet)
        passed = np.flatnonzero(values >= (1 - 1e-9) / alpha)
        selected = e_bh({str(i): float(values[i]) for i in passed}, adapters, FDR)
        found.append(
            (
                len(passed) / adapters,
                np.sum(passed < bad) / max(len(passed), 1),
                len(selected) / adapters,
                sum(int(name) < bad for name in selected) / max(len(selected), 1),
            )
        )
    return FleetRates(*map(float, np.mean(found, axis=0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fleets", type=int, default=40)
    fleets = parser.parse_args().fleets
    print("| bad adapters | alpha | passed | bad among passed | selected | bad among selected |")
    print("| -- | -- | -- | -- | -- | -- |")
    for bad_share in (0.1, 0.5, 0.9):
        for alpha in (0.05, 0.005):
            rates = simulate(bad_share, alpha, fleets=fleets)
            shown = " | ".join(f"{100 * rate:.1f} %" for rate in rates)
            print(f"| {100 * bad_share:.0f} % | {alpha:g} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
