"""Level and power of the gate on suites with degrees, from simulated adapters.

    python -m benchmarks.degrees [--adapters 4000]

Each adapter is judged on one suite whose scores lie in [0, 1], such as chrF. "Many small changes":
40 % of the items change, by a beta-distributed amount with a standard deviation of 0.33. "Rare
collapses": some items fall from 1 to 0 and as many as nothing was lost rise, the others stay. The
t test on the mean change is shown for comparison. The benchmark takes half a minute on one core.
Its table is in docs/statistics.md.
"""

import argparse
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from trans_peft.validation.statistics.betting import BettingTest

MARGIN, ALPHA = 0.05, 0.05
_CHANGED, _CONCENTRATION, _RARE = 0.4, 8.0, 0.01


class PassRates(NamedTuple):
    """Shares of simulated adapters that were shown to be non-inferior."""

    betting: float
    t_test: float


def changes(kind: str, n: int, loss: float, *, adapters: int, seed: int) -> NDArray[np.float64]:
    """Return changes in [-1, 1] of shape (n, adapters), with a mean of -`loss`."""
    rng = np.random.default_rng(seed)
    if kind == "rare collapses":
        draws = rng.random((n, adapters))
        return np.where(draws < loss + _RARE, -1.0, np.where(draws < loss + 2 * _RARE, 1.0, 0.0))
    mean = -loss / _CHANGED
    a, b = _CONCENTRATION * (1 + mean) / 2, _CONCENTRATION * (1 - mean) / 2
    amount = 2 * rng.beta(a, b, (n, adapters)) - 1
    return np.where(rng.random((n, adapters)) < _CHANGED, amount, 0.0)


def simulate(kind: str, n: int, loss: float, *, adapters: int, seed: int = 0) -> PassRates:
    """Judge simulated adapters with a true loss of `loss` on `n` items."""
    x = changes(kind, n, loss, adapters=adapters, seed=seed)
    betting_test = BettingTest(
        np.full(adapters, -MARGIN), items=n, alpha=ALPHA, effect=MARGIN, unit_steps=False
    )
    for values in x:
        betting_test.observe(values)
    deviation = np.maximum(x.std(axis=0, ddof=1), 1e-12)
    t = (x.mean(axis=0) + MARGIN) / deviation * np.sqrt(n)
    return PassRates(
        float(np.mean(betting_test.is_significant)),
        float(np.mean(t > student.isf(ALPHA, n - 1))),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=4000)
    adapters = parser.parse_args().adapters
    print("| changes | items | passed, loss 5 | passed, loss 0 | t test, loss 5 | t test, loss 0 |")
    print("| -- | -- | -- | -- | -- | -- |")
    for kind in ("many small changes", "rare collapses"):
        for n in (50, 100, 200, 500):
            lost, kept = (
                simulate(kind, n, loss, adapters=adapters, seed=n) for loss in (MARGIN, 0.0)
            )
            print(
                f"| {kind} | {n} | {100 * lost.betting:.1f} % | {100 * kept.betting:.0f} % "
                f"| {100 * lost.t_test:.1f} % | {100 * kept.t_test:.0f} % |",
                flush=True,
            )


if __name__ == "__main__":
    main()
