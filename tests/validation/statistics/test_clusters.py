"""Cluster-robust bounds, and betting with one bet per cluster."""

import re
from dataclasses import replace
from itertools import combinations
from math import isclose
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from benchmarks.clusters import UNEQUAL, changes, simulate, unequal
from tests.validation.statistics.test_sequential import EARLY, drive
from tests.validation.test_gate import POLICY, POOR, bits, three
from trans_peft.domain.evaluation import Verdict
from trans_peft.validation.gate import judge
from trans_peft.validation.statistics import intervals
from trans_peft.validation.statistics.betting import BettingTest
from trans_peft.validation.statistics.clusters import ClusterCounts
from trans_peft.validation.statistics.order import order
from trans_peft.validation.statistics.sequential import SequentialGate

PAGE = (Path(__file__).parents[3] / "docs" / "statistics.md").read_text()
X = st.sampled_from([-1, 0, 0, 0, 1])
GROUPS = st.lists(st.lists(X, min_size=1, max_size=8), min_size=2, max_size=30)


def counts_of(groups):
    """The counts of items that are listed by cluster."""
    labels = [number for number, group in enumerate(groups) for _ in group]
    return ClusterCounts.of([x for group in groups for x in group], labels)


def clustered(evaluations, size):
    """The evaluations with every `size` items in one cluster."""
    return {
        name: replace(
            evaluation,
            items=tuple(
                replace(item, cluster=f"document {number // size}")
                for number, item in enumerate(evaluation.items)
            ),
        )
        for name, evaluation in evaluations.items()
    }


# The statistic and its bounds.


@given(GROUPS, st.floats(-0.9, 0.9))
@settings(max_examples=30, deadline=None)
def test_the_statistic_is_tangos_divided_by_a_variance_that_counts_clusters(groups, difference):
    flat = [x for group in groups for x in group]
    by_cluster = sum(sum(x - difference for x in group) ** 2 for group in groups)
    by_item = sum((x - difference) ** 2 for x in flat)
    tango = intervals.score_statistic(len(flat), flat.count(-1), flat.count(1), difference)
    pairs = [pair for group in groups for pair in combinations(np.array(group) - difference, 2)]
    products, squares = sum(x * y for x, y in pairs), sum((x * x + y * y) / 2 for x, y in pairs)
    largest = sum(len(group) ** 2 for group in groups) / len(flat)
    kish = 1 + (products / squares if squares else 1) * (largest - 1)
    expected = float(tango) / np.sqrt(max(1.0, kish, by_cluster / by_item if by_item else 1.0))
    assert float(counts_of(groups).statistic(difference)) == pytest.approx(expected, abs=1e-9)


@given(st.lists(X, min_size=1, max_size=200), st.sampled_from([0.01, 0.05, 0.2]))
@settings(deadline=None, max_examples=30)
def test_clusters_of_one_item_have_the_figures_of_independent_items(xs, alpha):
    counts = counts_of([[x] for x in xs])
    pairs = len(xs), xs.count(-1), xs.count(1)
    found = counts.lower_bound(alpha), counts.upper_bound(alpha)
    expected = intervals.lower_bound(*pairs, alpha), intervals.upper_bound(*pairs, alpha)
    assert found == pytest.approx(expected, abs=1e-9)
    assert counts.statistic(-0.05) == pytest.approx(
        intervals.score_statistic(*pairs, -0.05), abs=1e-9
    )
    assert counts.power_of_non_inferiority(0.05, alpha) == pytest.approx(
        intervals.power_of_non_inferiority(len(xs), 1 - xs.count(0) / len(xs), 0.05, alpha),
        abs=1e-9,
    )


def test_equal_items_count_as_one():
    """A cluster whose items are all equal has the information of one item."""
    xs = [-1] * 10 + [1] * 12 + [0] * 178
    copies = counts_of([[x] * 5 for x in xs])
    assert float(copies.design_effect(-0.05)) == pytest.approx(5)
    assert float(copies.statistic(-0.05)) == pytest.approx(
        float(counts_of([[x] for x in xs]).statistic(-0.05))
    )


def test_few_large_clusters_and_many_single_items():
    counts = counts_of([[0] * 30] * 5 + [[-1]] * 10 + [[1]] * 3 + [[0]] * 137)
    assert counts.effective_clusters == pytest.approx(300**2 / (5 * 30**2 + 150))
    # The only pairs are those of the large clusters, whose items are equal: rho is 1.
    assert float(counts.design_effect(-0.05)) == pytest.approx((5 * 30**2 + 150) / 300)
    assert counts.quantile(0.05) == pytest.approx(student.isf(0.05, counts.effective_clusters - 1))


@given(
    st.integers(2, 6).flatmap(
        lambda m: st.lists(
            st.lists(st.sampled_from([-1, 0, 1]), min_size=m, max_size=m), min_size=2, max_size=20
        )
    )
)
@settings(deadline=None, max_examples=30)
def test_clusters_of_one_size_have_the_robust_design_effect(groups):
    counts = counts_of(groups)
    x = np.array(groups) + 0.05
    robust = max(np.sum(x.sum(axis=1) ** 2) / np.sum(x**2), 1)
    assert float(counts.design_effect(-0.05)) == pytest.approx(robust, abs=1e-9)
    assert counts.effective_clusters == pytest.approx(len(groups), abs=1e-9)


@pytest.mark.parametrize("sizes", UNEQUAL.values(), ids=UNEQUAL)
def test_clusters_of_unequal_sizes_keep_the_level(sizes):
    assert unequal(sizes, 0.07, 0.02, adapters=500, seed=2) <= 0.05 + 3 * 0.01


def test_the_table_of_unequal_clusters_in_the_docs_shows_the_level():
    lines = PAGE.split("<!-- unequal:")[1].split("\n\n")[1].splitlines()[2:]
    rows = [[cell.strip(" %") for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in rows] == list(UNEQUAL)
    for name, _, *rates in rows:
        assert max(map(float, rates)) <= 5 + 3 * 0.35
        again = 100 * unequal(UNEQUAL[name], 0.1, 0.05, adapters=300, seed=5)
        assert again == pytest.approx(float(rates[2]), abs=5)


def test_the_share_of_flips_in_unequal_clusters_keeps_the_level():
    draws = np.random.default_rng(4).random((400, 155)) < 0.1
    sizes = np.array(UNEQUAL["5 of 30, 150 of 1"], dtype=float)
    counts = [ClusterCounts(sizes, sizes * lost, 0 * sizes) for lost in draws]
    assert np.mean([c.largest_loss_share(0.05, limit=0.1) < 0.1 for c in counts]) <= 0.08
    assert np.mean([c.smallest_loss_share(0.05, limit=0.1) > 0.1 for c in counts]) <= 0.08


def test_bounds_agree_with_a_bootstrap_by_cluster():
    x = changes(200, 5, adapters=1, loss=0.02, correlation=0.3, seed=4)[0]
    rng, sums = np.random.default_rng(0), x.sum(axis=1)
    draws = np.array([rng.choice(sums, 200).sum() / x.size for _ in range(4000)])
    counts = counts_of(x.tolist())
    assert counts.lower_bound(0.05) == pytest.approx(np.quantile(draws, 0.05), abs=0.003)
    assert counts.upper_bound(0.05) == pytest.approx(np.quantile(draws, 0.95), abs=0.003)


@given(GROUPS, st.sampled_from([0.01, 0.05, 0.2]))
@settings(deadline=None, max_examples=15)
def test_the_test_rejects_everything_below_the_lower_bound(groups, alpha):
    counts = counts_of(groups)
    lower = counts.lower_bound(alpha)
    below = np.linspace(-0.999, lower, 50, endpoint=False)
    if lower > -0.999:
        assert np.all(counts.statistic(below) > counts.quantile(alpha) - 1e-6)
    assert lower <= counts.points / 100 + 1e-9
    assert isclose(counts.upper_bound(alpha), -counts.reversed().lower_bound(alpha))


def test_clusters_never_make_a_bound_narrower():
    groups = [[1, -1]] * 30 + [[0, 0]] * 20  # correlation -1 within the clusters
    flat = [[x] for group in groups for x in group]
    assert float(counts_of(groups).design_effect(0.0)) == 1
    assert counts_of(groups).lower_bound(0.05) <= counts_of(flat).lower_bound(0.05)


def test_one_cluster_decides_nothing():
    counts = counts_of([[0] * 500])
    assert (counts.lower_bound(0.05), counts.upper_bound(0.05)) == (-1, 1)
    assert counts.power_of_non_inferiority(0.05, 0.05) == 0


def test_more_clusters_are_needed_than_independent_items():
    groups = changes(50, 10, adapters=1, loss=0.0, correlation=0.3, seed=1)[0].tolist()
    flat = counts_of([[x] for group in groups for x in group])
    found, independent = (
        counts.items_to_decide(-0.05, 0.05) for counts in (counts_of(groups), flat)
    )
    assert found / independent == pytest.approx(
        float(counts_of(groups).design_effect(-0.05)), rel=0.01
    )


# The simulation of docs/statistics.md.

TABLE = [
    [float(number) for number in re.findall(r"[\d.]+", line)]
    for line in PAGE.split("<!-- clusters:")[1].split("\n\n")[1].splitlines()[2:]
]


def test_by_items_too_many_adapters_pass_at_the_margin_and_by_clusters_they_do_not():
    found = simulate(10, 0.05, adapters=600, seed=3)
    assert found.fixed_by_items > 0.15 and found.betting_by_items > 0.15
    assert found.fixed_by_clusters <= 0.05 + 3 * 0.009
    assert found.betting_by_clusters <= 0.05


@pytest.mark.parametrize("row", [row for row in TABLE if row[1] == 10])
def test_the_table_in_the_docs_matches_the_simulation(row):
    _, size, loss, *rates = row
    found = simulate(int(size), loss / 100, adapters=400, seed=7)
    assert [100 * rate for rate in vars(found).values()] == pytest.approx(rates, abs=8)


def test_the_table_in_the_docs_shows_the_level():
    at_margin = [row for row in TABLE if row[2] == 5 and row[1] > 1]
    assert len(at_margin) == 3
    for _, _, _, fixed_items, fixed_clusters, betting_items, betting_clusters in at_margin:
        assert min(fixed_items, betting_items) > 5 + 3 * 0.35
        assert max(fixed_clusters, betting_clusters) <= 5 + 3 * 0.35


# Betting.


@given(GROUPS)
@settings(deadline=None, max_examples=30)
def test_a_cluster_is_one_bet_on_the_sum_of_its_items(groups):
    """The bets are those of a test whose items are the sums of the clusters."""
    largest = max(map(len, groups))
    weighted = BettingTest(-0.05, items=len(groups), alpha=0.05, effect=0.02)
    for group in groups:
        before = weighted.wealth
        weighted.observe(np.mean(group), len(group) / largest)
        win = sum(x + 0.05 for x in group) / largest
        assert weighted.wealth <= before * (1 + 0.9 / 0.95 * max(win, 0)) + 1e-12
        assert win >= 0 or weighted.wealth <= before
    assert weighted.observed_items == len(groups) and weighted.wealth >= 0


def test_clusters_of_different_sizes_keep_the_level():
    """One cluster in five has 8 items, whose loss is shared; the mean over the items is -0.05."""
    rng = np.random.default_rng(0)
    betting_test = BettingTest(
        np.full(2000, -0.05), items=60, alpha=0.1, effect=0.05 * 2.4 / 8, unit_steps=False
    )
    for _ in range(60):
        large = rng.random(2000) < 0.2
        # items: 0.2 * 8 + 0.8 = 2.4 a cluster; losses: 0.2 * 8 * 0.075 = 0.12 a cluster
        x = -(large & (rng.random(2000) < 0.075)).astype(float)
        betting_test.observe(x, np.where(large, 1.0, 1 / 8))
    assert np.mean(betting_test.is_significant) <= 0.1 + 3 * 0.0067


# The gate.


@pytest.mark.parametrize("policy", [POLICY, EARLY], ids=["fixed", "sequential"])
def test_clusters_of_one_item_change_no_figure_of_a_verdict(policy):
    arms = three(bits(100, 20), bits(98, 22, 7), bits(8, 112))
    single = [clustered(arm, 1) for arm in arms]
    if policy.sequential:
        judgments = []
        for reference, *others in (arms, single):
            _, candidate, bare = drive(policy, reference, *others)
            judgments.append(judge(policy, reference, candidate, bare))
    else:
        judgments = [judge(policy, *arms), judge(policy, *single)]
    assert judgments[0] == judgments[1]


def test_losses_that_share_documents_are_less_certain():
    arms = three([1] * 300, [0] * 5 + [1] * 295, POOR)
    alone, together = judge(POLICY, *arms), judge(POLICY, *(clustered(arm, 5) for arm in arms))
    assert alone.verdict is Verdict.PASSED
    found, before = together.suites[0].versus_old_base, alone.suites[0].versus_old_base
    assert (found.difference, found.items) == (before.difference, before.items)
    assert found.lower < before.lower
    assert (together.suites[0].clusters, alone.suites[0].clusters) == (60, 0)
    assert together.suites[0].power < alone.suites[0].power
    assert "300 items in 60 clusters (design effect " in together.reason


def test_a_suite_of_one_cluster_is_inconclusive():
    arms = [clustered(arm, 300) for arm in three([1] * 300, [1] * 300, POOR)]
    judgment = judge(POLICY, *arms)
    assert judgment.verdict is Verdict.INCONCLUSIVE
    assert "300 items in 1 clusters" in judgment.reason


def test_the_sequential_gate_requests_whole_clusters():
    reference, candidate, bare = (
        clustered(arm, 7) for arm in three([1] * 300, bits(280, 20, 3), POOR)
    )
    gate = SequentialGate(EARLY, reference, "new")
    test = gate.suites["imports"]
    cluster = {item.id: item.cluster for item in reference["imports"].items}
    labels = [cluster[id_] for id_ in test.order]
    starts = [i for i, label in enumerate(labels) if i == 0 or label != labels[i - 1]]
    assert len(starts) == len(set(labels)) == test.clusters.count == 43
    assert set(test.batch_ends) <= {*starts, 300}
    driven, evaluated, _ = drive(EARLY, reference, candidate, bare)
    assert driven.verdict is judge(EARLY, reference, evaluated, bare).verdict
    observed = driven.suites["imports"]
    assert len(observed.changes) in observed.batch_ends
    assert observed.non_inferior.observed_items == len(set(labels[: len(observed.changes)]))


def test_the_order_of_independent_items_does_not_depend_on_names_of_clusters():
    ids = [f"item-{i}" for i in range(50)]
    assert order(ids, "seed") == order(ids, "seed", {id_: f"c {id_}" for id_ in ids})
