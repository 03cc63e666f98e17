"""Suites with degrees: the claim is about the mean of a score from 0 to 1."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.degrees import simulate
from tests.validation.statistics.test_clusters import clustered
from tests.validation.test_gate import POLICY
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import (
    BARE,
    Evaluation,
    ItemResult,
    Suite,
    Verdict,
    flipped_items,
)
from trans_peft.edges.json_codec import from_json, to_json
from trans_peft.errors import InvalidSpecError
from trans_peft.validation.gate import judge
from trans_peft.validation.scoring import make_scorer
from trans_peft.validation.statistics.betting import BettingTest
from trans_peft.validation.statistics.degrees import DegreeChanges
from trans_peft.validation.statistics.order import SuiteClusters
from trans_peft.validation.statistics.pairing import count_pairs

PAGE = (Path(__file__).parents[2] / "docs" / "statistics.md").read_text()
RNG = np.random.default_rng(2)
OLD = RNG.beta(6, 3, 200)


def degrees(values, base="new", weights="adapter"):
    items = tuple(ItemResult(f"q{i}", float(value)) for i, value in enumerate(values))
    return {"summaries": Evaluation("summaries", weights, base, "hash", "greedy", items)}


def arms(new, old=OLD, bare=None):
    bare = np.zeros(len(old)) if bare is None else bare
    return degrees(old, "old"), degrees(new), degrees(bare, weights=BARE)


def of(changes, effect=0.05):
    return DegreeChanges(list(changes), SuiteClusters(range(len(changes))), effect)


@given(
    st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=20, max_size=80),
    st.sampled_from([0.05, 0.2]),
)
@settings(deadline=None, max_examples=20)
def test_the_bound_separates_significant_thresholds_from_others(changes, alpha):
    def is_significant(threshold):
        test = BettingTest(
            threshold, items=len(changes), alpha=alpha, effect=0.05, unit_steps=False
        )
        for change in changes:
            test.observe(change)
        return bool(test.is_significant)

    lower = of(changes).lower_bound(alpha)
    assert -1 <= lower <= np.mean(changes) + 1e-4
    assert (lower >= -0.05) == is_significant(-0.05)
    assert lower == -1 or is_significant(lower)


def test_small_gains_reach_significance():
    assert of([0.1] * 100).lower_bound(0.05) > 0
    assert of([-0.1] * 200).upper_bound(0.05) < -0.05


def test_the_wealth_of_degrees_equals_the_formula():
    """The first three bets, restated for real numbers."""
    xs, threshold, items, alpha = [0.2, -0.4, 0.7], -0.05, 3, 0.05
    betting_test, wealth = BettingTest(threshold, items=items, alpha=alpha, effect=0.05), alpha
    for k, x in enumerate(xs):
        seen = xs[:k]
        variance = (3 + sum(v * v for v in seen)) / (20 + k) - (sum(seen) / (20 + k)) ** 2
        excess = sum(v - threshold for v in seen) / (20 + k) - np.sqrt(variance / (20 + k))
        kelly = max(0.025, excess) / variance
        betting_test.observe(x)
        bet = (float(betting_test.wealth) / wealth - 1) / (x - threshold)
        assert kelly - 1e-9 <= bet <= 0.9 / (1 + threshold) + 1e-9
        wealth = float(betting_test.wealth)


def test_the_mean_change_and_its_bounds_are_close_to_those_of_a_bootstrap():
    new = np.clip(OLD + RNG.normal(-0.02, 0.1, 200), 0, 1)
    counts = count_pairs(arms(new)[0]["summaries"], arms(new)[1]["summaries"], 0.05)
    assert counts.points == pytest.approx(100 * np.mean(new - OLD))
    draws = [RNG.choice(new - OLD, 200).mean() for _ in range(2000)]
    assert counts.lower_bound(0.05) == pytest.approx(np.quantile(draws, 0.05), abs=0.015)
    assert counts.upper_bound(0.05) == pytest.approx(np.quantile(draws, 0.95), abs=0.015)


CASES = {
    "kept": (0.0, 0.05, "passed"),
    "lost ten points": (-0.1, 0.05, "needs-retuning"),
    "lost about the margin": (-0.05, 0.3, "inconclusive"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_verdict_is_about_the_mean(case):
    shift, noise, verdict = CASES[case]
    new = np.clip(OLD + np.random.default_rng(5).normal(shift, noise, 200), 0, 1)
    if case == "lost about the margin":
        new += OLD.mean() - 0.05 - new.mean()
    judgment = judge(POLICY, *arms(np.clip(new, 0, 1)))
    assert judgment.verdict == verdict
    (suite,) = judgment.suites
    assert suite.score == pytest.approx(100 * np.clip(new, 0, 1).mean())
    assert (
        suite.versus_old_base.lower < suite.versus_old_base.difference < suite.versus_old_base.upper
    )
    assert suite.more_items > 0 or verdict != "inconclusive"


def test_a_bare_base_with_equal_degrees_retires_the_adapter():
    assert judge(POLICY, *arms(OLD, bare=OLD)).verdict is Verdict.RETIRE


def test_too_few_items_are_inconclusive_with_little_power():
    judgment = judge(POLICY, *arms(OLD[:20], old=OLD[:20]))
    assert judgment.verdict is Verdict.INCONCLUSIVE
    assert judgment.suites[0].power < 0.3


def test_power_is_the_share_of_passes_without_loss():
    changes = RNG.normal(0.03, 0.25, 200).clip(-1, 1)
    power = of(changes).power_of_non_inferiority(0.05, 0.05)
    passed = np.mean(
        [
            of(RNG.choice(changes - changes.mean(), 200)).lower_bound(0.05) >= -0.05
            for _ in range(12)
        ]
    )
    assert power == pytest.approx(passed, abs=0.3)
    assert 0.5 < power < 0.95


def test_clusters_are_one_bet():
    new = np.clip(OLD - 0.3 * (np.arange(200) < 20), 0, 1)
    alone, together = (
        judge(POLICY, *(clustered(arm, size) for arm in arms(new))).suites[0] for size in (1, 20)
    )
    assert (alone.clusters, together.clusters) == (0, 10)
    assert together.versus_old_base.difference == pytest.approx(alone.versus_old_base.difference)
    assert together.versus_old_base.lower < alone.versus_old_base.lower


def test_falls_of_one_half_are_negative_flips():
    old, new = np.full(100, 0.9), np.r_[np.full(3, 0.3), np.full(5, 0.5), np.full(92, 0.95)]
    reference, candidate, bare = arms(new, old=old)
    found = judge(POLICY, reference, candidate, bare).suites[0].negative_flips
    assert (found.items, found.points) == (3, 3)
    flips = flipped_items(reference["summaries"], candidate["summaries"])
    assert [before.id for before, _ in flips] == ["q0", "q1", "q2"]


def test_a_sequential_policy_refuses_degrees():
    with pytest.raises(InvalidSpecError, match="has degrees, which a sequential policy cannot"):
        judge(replace(POLICY, sequential=True), *arms(OLD))


def test_degrees_are_stored_and_read_as_degrees():
    evaluation = degrees([0.0, 0.25, 1.0])["summaries"]
    read = from_json(Evaluation, to_json(evaluation), where="a test")
    assert read == evaluation and read.has_degrees and read.score == pytest.approx(125 / 3)
    right = replace(evaluation, items=(ItemResult("a", True), ItemResult("b", False)))
    read = from_json(Evaluation, to_json(right), where="a test")
    assert [item.correct for item in read.items] == [True, False] and not read.has_degrees


@pytest.mark.parametrize("rule", ["bleu", "chrf", "rouge_l", "label_f1"])
def test_a_graded_rule_without_a_threshold_returns_degrees(rule):
    suite = Suite("summaries", DataSource("rows.jsonl"), scoring=rule)
    score = make_scorer(suite)
    assert score("the cat sat on the mat", "the cat sat on the mat") == pytest.approx(1.0)
    assert 0 <= score("a dog", "the cat sat on the mat") < 0.3
    assert make_scorer(replace(suite, threshold=50))("a dog", "the cat sat") is False


# The simulation of docs/statistics.md.

TABLE = [
    [line.split("|")[1].strip(), *map(float, re.findall(r"[\d.]+", line))]
    for line in PAGE.split("<!-- degrees:")[1].split("\n\n")[1].splitlines()[2:]
]


@pytest.mark.parametrize("row", [row for row in TABLE if row[1] in (100, 200)])
def test_the_table_in_the_docs_matches_the_simulation(row):
    kind, n, at_margin, at_none, *t_test = row
    lost, kept = (simulate(kind, int(n), loss, adapters=600, seed=3) for loss in (0.05, 0.0))
    assert 100 * lost.betting == pytest.approx(at_margin, abs=3)
    assert 100 * kept.betting == pytest.approx(at_none, abs=7)
    assert [100 * lost.t_test, 100 * kept.t_test] == pytest.approx(t_test, abs=7)


def test_the_table_in_the_docs_shows_the_level():
    assert max(row[2] for row in TABLE) <= 5 + 3 * 0.35
    assert max(row[4] for row in TABLE) > 6
