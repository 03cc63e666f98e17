"""Negative flips: items that are right on the old base and wrong on the new one."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from tests.validation.statistics.test_clusters import clustered
from tests.validation.statistics.test_sequential import drive
from tests.validation.test_gate import POLICY, POOR, bits, merged, three
from trans_peft.domain.evaluation import GatePolicy, Verdict
from trans_peft.errors import InvalidSpecError
from trans_peft.validation.gate import judge
from trans_peft.validation.statistics.clusters import ClusterCounts

LIMITED = replace(POLICY, max_negative_flip_points=4)
EARLY = replace(LIMITED, sequential=True)


def swapped(lost, gained, items=600):
    """Arms of which `lost` items are lost and `gained` gained, for a bare base that is worse."""
    reference = [1] * (items - gained) + [0] * gained
    candidate = [0] * lost + [1] * (items - lost)
    return three(reference, candidate, [0] * items)


@given(st.integers(1, 300), st.integers(0, 300), st.sampled_from([0.01, 0.05]))
def test_the_bounds_are_those_of_the_exact_binomial_distribution(n, b, alpha):
    b = min(b, n)
    counts = ClusterCounts.of([-1] * b + [0] * (n - b), range(n))
    lower, upper = counts.smallest_loss_share(alpha), counts.largest_loss_share(alpha)
    assert b == n or binom.cdf(b, n, upper) == pytest.approx(alpha, rel=1e-6)
    assert b == 0 or binom.sf(b - 1, n, lower) == pytest.approx(alpha, rel=1e-6)
    assert (lower == 0 or b > 0) and (upper == 1 or b < n)


def test_the_items_of_a_cluster_that_are_equal_count_as_one():
    single = ClusterCounts.of([-1] * 4 + [0] * 196, range(200))
    copies = ClusterCounts.of([-1] * 20 + [0] * 980, [i // 5 for i in range(1000)])
    found, alone = copies.largest_loss_share(0.05), single.largest_loss_share(0.05)
    # Student's quantile of 199 degrees of freedom instead of the normal one makes it wider.
    assert alone < found == pytest.approx(alone, abs=0.001)


def test_every_verdict_counts_them():
    found = judge(POLICY, *swapped(lost=30, gained=40)).suites[0].negative_flips
    assert (found.items, found.points) == (30, 5)
    assert binom.cdf(30, 600, found.upper / 100) == pytest.approx(0.05)
    assert (found.below_limit, found.above_limit) == (False, False)


def test_gains_compensate_losses_for_the_margin_but_not_for_the_limit():
    arms = swapped(lost=60, gained=60)
    assert judge(POLICY, *arms).verdict is Verdict.PASSED
    judgment = judge(LIMITED, *arms)
    assert judgment.verdict is Verdict.NEEDS_RETUNING
    assert judgment.suites[0].negative_flips.above_limit
    assert (
        "60 items are right on the old base and wrong on the new one (10.00 points, at least 7.72, "
        "limit 4)" in judgment.reason
    )


def test_few_flips_pass():
    judgment = judge(LIMITED, *swapped(lost=12, gained=12))
    assert judgment.verdict is Verdict.PASSED
    assert "12 items are right on the old base" in judgment.reason
    assert "at most 3.22, limit 4" in judgment.reason


def test_too_few_items_for_the_limit_are_inconclusive_with_a_number_of_items():
    judgment = judge(LIMITED, *swapped(lost=18, gained=18))
    assert judgment.verdict is Verdict.INCONCLUSIVE
    assert "18 items are right on the old base" in judgment.reason
    assert judgment.suites[0].more_items > 0 and "more items would decide" in judgment.reason


def test_the_tests_of_the_limit_share_the_level_of_the_inferiority_tests():
    assert POLICY.levels(2) == (0.05, 0.025)
    assert LIMITED.levels(2) == (0.05, 0.0125)
    assert LIMITED.levels(1, has_fresh_test=True) == (0.05, pytest.approx(0.05 / 3))


def test_flips_of_one_document_are_less_certain():
    arms = swapped(lost=12, gained=12)
    together = judge(LIMITED, *(clustered(arm, 12) for arm in arms))
    alone = judge(LIMITED, *arms)
    found, before = (j.suites[0].negative_flips for j in (together, alone))
    assert (found.items, before.items) == (12, 12)
    assert found.upper > before.upper + 1 and not found.below_limit


@pytest.mark.parametrize(
    ("lost", "verdict"), [(False, Verdict.PASSED), (True, Verdict.NEEDS_RETUNING)]
)
def test_a_sequential_policy_tests_the_limit_as_well(lost, verdict):
    # The losses are spread over the suite, and gains compensate them.
    after = [int(i % 6 != 0) if lost else 1 for i in range(300)]
    before = [int(i % 6 != 1) if lost else 1 for i in range(300)]
    reference, candidate, bare = three(before, after, [0] * 300)
    gate, evaluated, bare = drive(EARLY, reference, candidate, bare)
    judgment = judge(EARLY, reference, evaluated, bare)
    assert gate.verdict is judgment.verdict is verdict
    found = judgment.suites[0].negative_flips
    assert found.below_limit == (verdict is Verdict.PASSED)
    assert found.above_limit == (verdict is Verdict.NEEDS_RETUNING)
    assert found.lower <= found.points <= found.upper


def test_a_suite_that_is_not_required_has_no_say():
    arms = merged(swapped(12, 12), three(bits(260, 40), bits(260, 40, 150), POOR, "extra"))
    judgment = judge(replace(LIMITED, required_suites=("imports",)), *arms)
    assert judgment.verdict is Verdict.PASSED
    assert judgment.suites[1].negative_flips.above_limit


def test_policies_without_a_limit_keep_their_hash():
    assert GatePolicy().sha256 == "4c4a73e348cccc60615f829a4310c6481d5cf10c0b997f673bf975c3f611eeb6"
    assert GatePolicy(max_negative_flip_points=3).sha256 != GatePolicy().sha256


@pytest.mark.parametrize("limit", [0, -1, 100])
def test_an_impossible_limit_is_an_error(limit):
    with pytest.raises(InvalidSpecError, match="max_negative_flip_points must lie in"):
        GatePolicy(max_negative_flip_points=limit)
