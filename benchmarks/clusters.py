"""Level and power of the gate on items that come in clusters, from simulated adapters.

    python -m benchmarks.clusters [--adapters 4000]

Each adapter is judged on one suite of 500 items, 20 % of them discordant. The items of a cluster
have an intra-cluster correlation of 0.3: an item has its cluster's common change with a
probability of sqrt(0.3), otherwise a change of its own. "By items" are the tests that take items as
independent, "by clusters" those that count clusters. A test keeps its level if at most 5 % of the
adapters that lost exactly the margin of 5 points pass. The benchmark takes about a minute on one
core. Its tables are in docs/statistics.md. The second one is about clusters of unequal sizes whose
items are all equal, so that few large clusters decide.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trans_peft.validation.statistics.betting import BettingTest
from trans_peft.validation.statistics.clusters import ClusterCounts

MARGIN, ALPHA, CORRELATION, ITEMS, DISCORDANT = 0.05, 0.05, 0.3, 500, 0.2


UNEQUAL = {
    "5 of 30, 150 of 1": [30] * 5 + [1] * 150,
    "8 of 20, 240 of 1": [20] * 8 + [1] * 240,
    "20 of 10, 100 of 1": [10] * 20 + [1] * 100,
    "50 of 10": [10] * 50,
}
"""Sizes of clusters, by their description."""


@dataclass(frozen=True)
class PassRates:
    """Shares of simulated adapters that were shown to be non-inferior.

    Attributes:
        fixed_by_items: by Tango's bound on all items, without clusters.
        fixed_by_clusters: by the cluster-robust bound.
        betting_by_items: by betting, with one bet per item.
        betting_by_clusters: by betting, with one bet per cluster.
    """

    fixed_by_items: float
    fixed_by_clusters: float
    betting_by_items: float
    betting_by_clusters: float


def changes(
    clusters: int, size: int, *, adapters: int, loss: float, correlation: float, seed: int
) -> NDArray[np.int8]:
    """Return changes (-1, 0 or 1) of shape (adapters, clusters, size)."""
    rng = np.random.default_rng(seed)

    def drawn(*shape: int) -> NDArray[np.int8]:
        draws = rng.random(shape, dtype=np.float32)
        worse = (DISCORDANT + loss) / 2
        return np.where(draws < worse, -1, np.where(draws < DISCORDANT, 1, 0)).astype(np.int8)

    own, common = drawn(adapters, clusters, size), drawn(adapters, clusters, 1)
    shared = rng.random((adapters, clusters, size), dtype=np.float32) < np.sqrt(correlation)
    return np.where(shared, common, own)


def simulate(
    size: int, loss: float, *, adapters: int, correlation: float = CORRELATION, seed: int = 0
) -> PassRates:
    """Judge simulated adapters with a true loss of `loss` on clusters of `size` items."""
    x = changes(
        ITEMS // size, size, adapters=adapters, loss=loss, correlation=correlation, seed=seed
    )
    return PassRates(
        fixed_by_items=float(np.mean([_passes(found.reshape(-1, 1)) for found in x])),
        fixed_by_clusters=float(np.mean([_passes(found) for found in x])),
        betting_by_items=_betting(x.reshape(adapters, -1)[:, _shuffled()], unit_steps=True),
        betting_by_clusters=_betting(x.mean(axis=2), unit_steps=size == 1),
    )


def unequal(sizes: Sequence[int], loss: float, gain: float, *, adapters: int, seed: int) -> float:
    """Return the share that passes if whole clusters are lost and gained with these probabilities.

    The adapters lost exactly the margin if `loss` - `gain` is 0.05.
    """
    items = np.array(sizes, dtype=float)
    draws = np.random.default_rng(seed).random((adapters, len(items)))
    lost = np.where(draws < loss, items, 0.0)
    gained = np.where((draws >= loss) & (draws < loss + gain), items, 0.0)
    counts = [ClusterCounts(items, *pair) for pair in zip(lost, gained, strict=True)]
    return float(np.mean([c.statistic(-MARGIN) > c.quantile(ALPHA) for c in counts]))


def _shuffled() -> NDArray[np.int64]:
    """Return an order of items that does not depend on their clusters."""
    return np.random.default_rng(0).permutation(ITEMS)


def _passes(found: NDArray[np.int8]) -> bool:
    """Return whether changes of shape (clusters, size) show non-inferiority."""
    losses, gains = (found < 0).sum(axis=1).astype(float), (found > 0).sum(axis=1).astype(float)
    counts = ClusterCounts(np.full(len(found), float(found.shape[1])), losses, gains)
    return bool(counts.statistic(-MARGIN) > counts.quantile(ALPHA))


def _betting(x: NDArray[np.generic], *, unit_steps: bool) -> float:
    """Return the share of significant tests; `x` has the shape (adapters, bets)."""
    betting_test = BettingTest(
        np.full(len(x), -MARGIN),
        items=x.shape[1],
        alpha=ALPHA,
        effect=MARGIN,
        unit_steps=unit_steps,
    )
    for values in x.T:
        betting_test.observe(values)
    return float(np.mean(betting_test.is_significant))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=4000)
    adapters = parser.parse_args().adapters
    print("| clusters | loss | fixed, items | fixed, clusters | betting, items | clusters |")
    print("| -- | -- | -- | -- | -- | -- |")
    for size in (2, 5, 10):
        for loss in (MARGIN, 0.0):
            found = simulate(size, loss, adapters=adapters, seed=size)
            rates = " | ".join(f"{100 * rate:.1f} %" for rate in vars(found).values())
            print(f"| {ITEMS // size} of {size} | {100 * loss:g} | {rates} |", flush=True)
    print_unequal(adapters)


def print_unequal(adapters: int) -> None:
    """Print the shares that pass with clusters of unequal sizes, for a loss of the margin."""
    print("| clusters | effective clusters | 5 lost, 0 gained | 7 and 2 | 10 and 5 | 20 and 15 |")
    print("| -- | -- | -- | -- | -- | -- |")
    for name, sizes in UNEQUAL.items():
        effective = sum(sizes) ** 2 / sum(size**2 for size in sizes)
        rates = " | ".join(
            f"{100 * unequal(sizes, gain + MARGIN, gain, adapters=adapters, seed=1):.1f} %"
            for gain in (0.0, 0.02, 0.05, 0.15)
        )
        print(f"| {name} | {effective:.0f} | {rates} |", flush=True)


if __name__ == "__main__":
    main()
