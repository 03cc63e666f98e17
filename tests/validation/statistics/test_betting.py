import re
from itertools import pairwise, product
from math import erf, log, sqrt
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.sequential import simulate
from trans_peft.errors import InvalidSpecError
from trans_peft.validation.statistics.betting import (
    BettingTest,
    bet_size,
    lower_confidence_limit,
    power_of_betting_test,
)
from trans_peft.validation.statistics.intervals import lower_bound, power_of_non_inferiority

NORMAL = NormalDist()
X = st.sampled_from([-1, 0, 1])
THRESHOLDS = st.sampled_from([-0.3, -0.05, 0.0, 0.05, 0.3])


def reference_wealth(xs, threshold, items, alpha, effect):
    """The wealth after each item: the formulas for one test, in plain Python."""
    wealth, history, wealths = alpha, [], []
    for x in xs:
        if wealth < 1:
            k = len(history)
            variance = (3 + sum(map(abs, history))) / (20 + k) - (sum(history) / (20 + k)) ** 2
            tail = wealth / 2
            density = NORMAL.pdf(NORMAL.inv_cdf(tail))
            excess = sum(value - threshold for value in history) / (20 + k)
            estimated_excess = max(effect / 2, excess - sqrt(variance / (20 + k)))
            bet = max(density / tail / sqrt((items - k) * variance), estimated_excess / variance)
            gains = [gain for v in (-1, 0, 1) if (gain := v - threshold) > 1e-12]
            sufficient = (1 - wealth) / (wealth * min(gains))
            wealth *= 1 + min(bet, sufficient, 0.9 / (1 + threshold)) * (x - threshold)
            wealth = 1.0 if wealth > 1 - 1e-12 else wealth
        history.append(x)
        wealths.append(wealth)
    return wealths


@given(st.lists(X, min_size=1, max_size=60), THRESHOLDS, st.integers(0, 40))
@settings(deadline=None)
def test_wealth_equals_the_plain_python_implementation(xs, threshold, unobserved):
    items = len(xs) + unobserved
    betting_test, found = BettingTest(threshold, items=items, alpha=0.05, effect=0.05), []
    for x in xs:
        betting_test.observe(x)
        found.append(float(betting_test.wealth))
    assert found == pytest.approx(reference_wealth(xs, threshold, items, 0.05, 0.05), rel=1e-9)


def shares(threshold):
    """(P(-1), P(0), P(1)) of populations with a mean at the threshold or below it."""
    for discordant in (abs(threshold), 0.3, 0.7, 1.0):
        for mean in (threshold, threshold - 0.1):
            if abs(mean) <= discordant:
                yield (discordant - mean) / 2, 1 - discordant, (discordant + mean) / 2


@pytest.mark.parametrize("threshold", [-0.4, -0.05, 0.0, 0.05, 0.4])
def test_a_true_hypothesis_is_rejected_with_at_most_alpha(threshold):
    """Exact, on all 3 ** 8 sequences: the mean wealth never grows, and rarely ever reaches 1."""
    items, alpha = 8, 0.1
    sequences = np.array(list(product((-1, 0, 1), repeat=items))).T
    betting_test = BettingTest(
        np.full(sequences.shape[1], threshold), items=items, alpha=alpha, effect=0.5
    )
    wealth = [betting_test.wealth]
    for x in sequences:
        betting_test.observe(x)
        wealth.append(betting_test.wealth)
    assert betting_test.is_significant.any()
    for p in shares(threshold):
        chances = np.prod(np.asarray(p)[sequences + 1], axis=0)
        means = [float(chances @ w) for w in wealth]
        assert all(later <= earlier + 1e-12 for earlier, later in pairwise(means))
        assert chances @ betting_test.is_significant <= alpha + 1e-12


@given(
    st.floats(1e-9, 0.999),
    st.integers(1, 2000),
    st.floats(0.001, 1.0),
    st.floats(-0.9, 0.9),
    st.floats(0.001, 0.5),
)
@settings(deadline=None)
def test_a_bet_is_never_negative_and_never_risks_all_wealth(
    wealth, items_remaining, variance, threshold, estimated_excess
):
    found = float(bet_size(wealth, items_remaining, variance, threshold, estimated_excess))
    assert 0 <= found * (1 + threshold) < 1


@pytest.mark.parametrize("wealth", [0.01, 0.05, 0.4])
def test_the_bet_hedges_the_probability_that_a_sum_reaches_a_constant(wealth):
    """P(a Wiener process reaches y by T) = 2 P(W_T > y) =: c(y). The hedge is -c'(y) / c(y)."""
    items_remaining, variance = 300, 0.2

    def estimated_power(y):
        return 1 - erf(y / sqrt(2 * variance * items_remaining))

    low, high = 0.0, 100.0
    for _ in range(80):
        low, high = (mid, high) if estimated_power(mid := (low + high) / 2) > wealth else (low, mid)
    slope = -(log(estimated_power(low + 1e-4)) - log(estimated_power(low - 1e-4))) / 2e-4
    assert float(bet_size(wealth, items_remaining, variance, -0.05, 1e-6)) == pytest.approx(
        slope, rel=1e-4
    )


@given(st.lists(X, min_size=2, max_size=30), X)
@settings(deadline=None)
def test_a_bet_does_not_depend_on_its_own_item(xs, other):
    """Below 1, the wealth is linear in the last x, so the bet did not depend on it."""
    wealth = []
    for last in (-1, 0, 1):
        betting_test = BettingTest(-0.05, items=200, alpha=0.05, effect=0.05)
        for x in [*xs, last]:
            betting_test.observe(x)
        wealth.append(float(betting_test.wealth))
    if max(wealth) < 1:
        assert wealth[1] == pytest.approx((wealth[0] + wealth[2]) / 2, rel=1e-9)


def test_bets_that_depend_on_the_old_result_would_pass_a_loss():
    """Items that were wrong before can only gain, so betting on them alone passes any loss.

    The true loss here is 20 points.
    """
    rng, wealth = np.random.default_rng(0), 0.05
    for _ in range(300):
        old = rng.random() < 0.8
        x = -int(rng.random() < 0.3) if old else int(rng.random() < 0.2)
        wealth *= 1 + (0.0 if old else 0.5) * (x + 0.05)
    assert wealth > 1


@pytest.mark.parametrize(("n", "discordant"), [(200, 0.05), (200, 0.2), (500, 0.1)])
def test_at_most_alpha_of_simulated_adapters_at_the_margin_pass(n, discordant):
    three_errors = 3 * sqrt(0.05 * 0.95 / 10_000)
    passed = simulate(n, discordant, 0.05, adapters=10_000, seed=11).passed
    assert 0.03 < passed <= 0.05 + three_errors


PAGE = (Path(__file__).parents[3] / "docs" / "verdicts.md").read_text()
EARLY = [
    [float(number) for number in re.findall(r"[\d.]+", line)]
    for line in PAGE.split("<!-- early:")[1].split("\n\n")[1].splitlines()[2:]
]


@pytest.mark.parametrize("row", EARLY, ids=lambda row: f"{row[0]:.0f} items, {row[1]:.0f} %")
def test_the_table_in_the_docs_matches_the_simulation(row):
    n, discordant, at_margin, at_none, fixed, mean_items, share = row
    assert fixed == round(100 * power_of_non_inferiority(int(n), discordant / 100, 0.05, 0.05))
    assert share == pytest.approx(100 * mean_items / n, abs=0.6)  # rounded numbers
    assert at_margin <= 5 + 3 * 0.22
    if n == 200:  # larger suites take too long in a test
        found = simulate(200, discordant / 100, 0.0, adapters=2000, seed=5)
        assert 100 * found.passed == pytest.approx(at_none, abs=4)
        assert found.mean_items == pytest.approx(mean_items, abs=4)


def test_a_significant_test_stays_significant():
    betting_test = BettingTest(-0.05, items=100, alpha=0.05, effect=0.05)
    for x in [1] * 20 + [-1] * 80:
        betting_test.observe(x)
    assert (
        betting_test.is_significant
        and betting_test.wealth == 1
        and betting_test.items_remaining == 0
        and betting_test.estimated_power == 1
    )


def test_estimated_power_starts_near_the_power_and_falls_with_losses():
    betting_test = BettingTest(-0.05, items=500, alpha=0.05, effect=0.05)
    for x in [1, -1] + [0] * 8:
        betting_test.observe(x)
    power = power_of_betting_test(500, 0.2, 0.05, 0.05)
    assert abs(float(betting_test.estimated_power) - power) < 0.25 and betting_test.is_undecided
    for x in [-1, 0] * 100:
        betting_test.observe(x)
    assert (
        betting_test.estimated_power < 0.01
        and not betting_test.is_undecided
        and not betting_test.is_significant
    )


def test_power_is_slightly_below_that_of_the_fixed_size_test():
    for n, share in ((200, 0.1), (500, 0.2)):
        fixed = power_of_non_inferiority(n, share, 0.05, 0.05)
        assert fixed - 0.12 < power_of_betting_test(n, share, 0.05, 0.05) < fixed


@given(st.lists(X, min_size=1, max_size=50), THRESHOLDS)
@settings(deadline=None, max_examples=30)
def test_a_limit_reaches_the_threshold_exactly_if_the_test_is_significant(xs, threshold):
    betting_test = BettingTest(threshold, items=60, alpha=0.1, effect=0.1)
    for x in xs:
        betting_test.observe(x)
    limit = lower_confidence_limit(xs, threshold, items=60, alpha=0.1, effect=0.1)
    assert (limit >= threshold) == bool(betting_test.is_significant)
    assert -1 <= limit < 1


def test_a_limit_lies_slightly_below_tangos_bound():
    b, c = 20, 20
    xs = list(np.random.default_rng(0).permutation([-1] * b + [1] * c + [0] * 360))
    tango = lower_bound(400, b, c, 0.05)
    limit = lower_confidence_limit(xs, -0.05, items=400, alpha=0.05, effect=0.05)
    assert tango - 0.015 < limit < tango + 0.005


@pytest.mark.parametrize(
    "wrong", [{"items": 0}, {"alpha": 0.0}, {"effect": 0.0}, {"threshold": -1.0}]
)
def test_arguments_outside_their_ranges_are_rejected(wrong):
    values = {"threshold": -0.05, "items": 10, "alpha": 0.05, "effect": 0.05} | wrong
    with pytest.raises(InvalidSpecError, match="outside their ranges"):
        BettingTest(values.pop("threshold"), **values)


def test_more_items_than_the_maximum_are_rejected():
    betting_test = BettingTest(-0.05, items=1, alpha=0.05, effect=0.05)
    betting_test.observe(0)
    with pytest.raises(InvalidSpecError, match="more items than its maximum"):
        betting_test.observe(0)
