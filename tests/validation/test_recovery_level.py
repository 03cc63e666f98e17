"""What several chances to pass do to the level, and that sharing it holds it: by simulation.

10,000 ladders of 500 items, on each of which every rung truly lost exactly the margin. The rungs'
answers are alike in part, as those of one adapter rescaled and re-tuned are.
"""

import numpy as np
import pytest
from scipy.stats import norm

from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.recovery import RecoveryPolicy
from trans_peft.validation.statistics.intervals import score_statistic

ITEMS, LADDERS, MARGIN, DISCORDANT, ALPHA = 500, 10_000, 0.05, 0.2, 0.05
LOST, GAINED = (DISCORDANT + MARGIN) / 2, (DISCORDANT - MARGIN) / 2
LADDER = GatePolicy(
    alpha=ALPHA, recovery=RecoveryPolicy(scales=(0.5, 1.5), retune_steps=40, retrain=True)
)
ERROR = 3 * np.sqrt(ALPHA * (1 - ALPHA) / LADDERS)


def passed_by_any(strategies, alike, alpha, *, seed=1):
    """Return how often some rung of a ladder passes; a share `alike` of items answer as one."""
    draws = np.random.default_rng(seed)
    found = np.zeros(LADDERS, dtype=bool)
    for start in range(0, LADDERS, 1_000):
        common = draws.random((1_000, ITEMS))
        shared = draws.random((1_000, ITEMS)) < alike
        for _ in range(strategies):
            u = np.where(shared, common, draws.random((1_000, ITEMS)))
            b, c = (u < LOST).sum(1), ((u >= LOST) & (u < LOST + GAINED)).sum(1)
            z = score_statistic(ITEMS, b, c, -MARGIN)
            found[start : start + 1_000] |= z > norm.isf(alpha)
    return found.mean()


@pytest.mark.parametrize("alike", [0.0, 0.9])
def test_a_ladder_keeps_the_level_of_its_policy(alike):
    strategies = len(LADDER.recovery.strategies)
    assert strategies == 4
    assert LADDER.per_strategy.alpha == ALPHA / 4
    assert passed_by_any(strategies, alike, LADDER.per_strategy.alpha) <= ALPHA + ERROR


@pytest.mark.parametrize(("alike", "at_least"), [(0.0, 0.15), (0.9, 0.07)])
def test_without_sharing_it_would_not(alike, at_least):
    assert passed_by_any(4, alike, ALPHA) > at_least


def test_a_ladder_of_one_rung_is_the_gate_itself():
    assert GatePolicy().per_strategy == GatePolicy()
