"""Tests the draws of eq. 4-7 for rate, uniformity and independence over many seeds.

    python -m benchmarks.draws [--seeds 100] [--first 0]

For each seed 20,000 draws of 256 neurons: 50 steps x 20 layers x 5 ranks x 2 micro-steps x 2 kinds
of sub-layer (5.12 million bits of probability 0.1, and 20,000 of probability 0.1 for dropping).
Each line is a family of z values that are standard normal if the draws are correct. It shows their
number, the largest |z|, the value that the largest |z| exceeds by chance in 5 % of cases, the mean
times the root of the number (also standard normal), and the p value of a Kolmogorov-Smirnov test.
100 seeds take about eight minutes of processor time.
"""

import argparse

import numpy as np
from scipy import stats

from trans_peft.domain.recipe import Perturbation
from trans_peft.perturbation.draws import SubLayerKind, TrainingPosition, draw

__all__ = ["AXES", "bits", "families"]

P = 0.1
PERTURBATION = Perturbation(masking_p=P, dropping_p=P)
AXES = ("step", "layer", "rank", "micro-step", "kind")
SHAPE = (50, 20, 5, 2, 2)
NEURONS = 256
KINDS: tuple[SubLayerKind, ...] = ("ffn", "attention")


def bits(seed: int, shape: tuple[int, ...] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Return which neurons are masked (*shape, neurons) and which sub-layers dropped (*shape)."""
    masked = np.empty((*shape, NEURONS), dtype=bool)
    dropped = np.empty(shape, dtype=bool)
    for place in np.ndindex(*shape):
        step, layer, rank, micro_step, kind = place
        drawn = draw(
            PERTURBATION,
            TrainingPosition(step, micro_step),
            seed=seed,
            rank=rank,
            layer=layer,
            kind=KINDS[kind],
            neurons=NEURONS,
        )
        assert drawn.kept is not None
        masked[place], dropped[place] = ~drawn.kept, drawn.dropped
    return masked, dropped


def families(seeds: range, shape: tuple[int, ...] = SHAPE) -> dict[str, np.ndarray]:
    """Return families of z values: rates by seed and by place, and covariances of neighbors."""
    names = (*AXES, "neuron")
    by_seed: dict[str, list[float]] = {"masked, by seed": [], "dropped, by seed": []}
    counts = {name: np.zeros(size) for name, size in zip(names, (*shape, NEURONS), strict=True)}
    neighbors: dict[str, list[float]] = {name: [] for name in (*names, "seed")}
    before = None
    for seed in seeds:
        masked, dropped = bits(seed, shape)
        by_seed["masked, by seed"].append(_rate(masked.sum(), masked.size))
        by_seed["dropped, by seed"].append(_rate(dropped.sum(), dropped.size))
        for axis, name in enumerate(names):
            counts[name] += masked.sum(axis=tuple(i for i in range(masked.ndim) if i != axis))
            line = np.moveaxis(masked, axis, 0)
            neighbors[name].append(_covariance(line[:-1], line[1:]))
        if before is not None:
            neighbors["seed"].append(_covariance(before, masked))
        before = masked
    size = len(seeds) * int(np.prod(shape)) * NEURONS
    return {
        **{name: np.array(values) for name, values in by_seed.items()},
        **{f"masked, by {n}": _rate(count, size // len(count)) for n, count in counts.items()},
        **{f"neighbors in {n}, by seed": np.array(zs) for n, zs in neighbors.items()},
    }


def _rate(count: np.ndarray, size: int) -> np.ndarray:
    """Return z of `count` of `size` independent bits of probability P."""
    return (count - size * P) / np.sqrt(size * P * (1 - P))


def _covariance(a: np.ndarray, b: np.ndarray) -> float:
    """Return z of the covariance of pairs of bits, which is zero for independent ones."""
    both = (a & b).sum() - P * (float(a.sum()) + float(b.sum())) + a.size * P * P
    return float(both / (np.sqrt(a.size) * P * (1 - P)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    chosen = parser.parse_args()
    seeds = range(chosen.first, chosen.first + chosen.seeds)
    print("| z values | how many | largest | chance (5 %) | mean x root n | KS p |")
    print("|---|---|---|---|---|---|")
    for name, z in families(seeds).items():
        bound = stats.norm.isf(0.025 / len(z))
        mean, p = z.mean() * np.sqrt(len(z)), stats.kstest(z, "norm").pvalue
        print(f"| {name} | {len(z)} | {abs(z).max():.2f} | {bound:.2f} | {mean:+.2f} | {p:.2f} |")


if __name__ == "__main__":
    main()
