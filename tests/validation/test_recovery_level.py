"""Recovery strategies that share alpha keep the level of the policy: a simulation.

10,000 adapters on 500 items, on which every strategy's candidate truly lost exactly the margin. The
results of the candidates agree in part, as those of one adapter that is rescaled and re-tuned do.
"""

import numpy as np
import pytest
from scipy.stats import norm

from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.recovery import RecoveryPolicy
from trans_peft.validation.statistics.intervals import score_statistic

ITEMS, ADAPTERS, MARGIN, DISCORDANT, ALPHA = 500, 10_000, 0.05, 0.2, 0.05
LOST, GAINED = (DISCORDANT + MARGIN) / 2, (DISCORDANT - MARGIN) / 2
POLICY = GatePolicy(
    alpha=ALPHA, recovery=RecoveryPolicy(scales=(0.5, 1.5), retune_steps=40, retrain=True)
)
ERROR = 3 * np.sqrt(ALPHA * (1 - ALPHA) / ADAPTERS)


def share_passed(strategies, agreement, alpha, *, seed=1):
    """Return how often at least one candidate passes; `agreement` is the share of equal results."""
    draws = np.random.default_rng(seed)
    passed = np.zeros(ADAPTERS, dtype=bool)
    for start in range(0, ADAPTERS, 1_000):
        common = draws.random((1_000, ITEMS))
        shared = draws.random((1_000, ITEMS)) < agreement
        for _ in range(strategies):
            u = np.where(shared, common, draws.random((1_000, ITEMS)))
            b, c = (u < LOST).sum(1), ((u >= LOST) & (u < LOST + GAINED)).sum(1)
            z = score_statistic(ITEMS, b, c, -MARGIN)
            passed[start : start + 1_000] |= z > norm.isf(alpha)
    return passed.mean()


@pytest.mark.parametrize("agreement", [0.0, 0.9])
def test_strategies_together_keep_the_level_of_the_policy(agreement):
    strategies = len(POLICY.recovery.strategies)
    assert strategies == 4
    assert POLICY.per_strategy.alpha == ALPHA / 4
    assert share_passed(strategies, agreement, POLICY.per_strategy.alpha) <= ALPHA + ERROR


@pytest.mark.parametrize(("agreement", "at_least"), [(0.0, 0.15), (0.9, 0.07)])
def test_unshared_alpha_exceeds_the_level(agreement, at_least):
    assert share_passed(4, agreement, ALPHA) > at_least


def test_one_strategy_uses_the_policy_unchanged():
    assert GatePolicy().per_strategy == GatePolicy()
