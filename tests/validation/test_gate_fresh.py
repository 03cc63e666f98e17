"""The gate with a freshly tuned adapter as a second reference on the new base."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.validation.test_gate import (
    A_INFERIOR,
    A_PASSING,
    A_REDUNDANT,
    bits,
    merged,
    results,
    three,
)
from trans_peft.domain.evaluation import BARE, GatePolicy, Verdict
from trans_peft.errors import InvalidSpecError
from trans_peft.validation.gate import judge
from trans_peft.validation.statistics.intervals import lower_bound, upper_bound

POLICY = GatePolicy(margin_points=5, alpha=0.05)
REQUIRED = replace(POLICY, must_match_fresh=True)


def fresh(right, suite="imports"):
    return results(right, suite, "fresh")


def test_it_is_reported_but_does_not_affect_the_verdict_by_default():
    arms = three(*A_PASSING)
    without, with_fresh = judge(POLICY, *arms), judge(POLICY, *arms, fresh(bits(298, 2)))
    assert without.verdict == with_fresh.verdict == Verdict.PASSED
    (figures,) = with_fresh.suites
    assert figures.versus_fresh_adapter.reference_score == pytest.approx(100 * 298 / 300)
    assert figures.versus_fresh_adapter.difference == pytest.approx(100 * (258 - 298) / 300)
    assert figures.versus_fresh_adapter.inferior
    assert "a freshly tuned adapter scores 99.3" in with_fresh.reason
    assert replace(figures, versus_fresh_adapter=None) == without.suites[0]


@pytest.mark.parametrize(
    ("arms", "right", "verdict"),
    [
        (A_PASSING, bits(258, 42), "passed"),
        (
            A_PASSING,
            bits(298, 2),
            "needs-retuning",
        ),  # nothing lost, but far below the fresh adapter
        (A_PASSING, bits(268, 32), "inconclusive"),
        (A_INFERIOR, bits(200, 100), "needs-retuning"),
        (A_REDUNDANT, bits(258, 42), "retire"),
    ],
)
def test_the_table_of_verdicts_with_must_match_fresh(arms, right, verdict):
    judgment = judge(REQUIRED, *three(*arms), fresh(right))
    assert judgment.verdict == verdict
    assert (judgment.suites[0].more_items > 0) == (verdict == "inconclusive")


def test_without_a_fresh_adapter_the_verdict_is_inconclusive():
    judgment = judge(REQUIRED, *three(*A_PASSING))
    assert judgment.verdict is Verdict.INCONCLUSIVE
    assert "no adapter was tuned on the new base" in judgment.reason


def test_every_required_suite_is_compared():
    arms = merged(three(*A_PASSING, suite="a"), three(*A_PASSING, suite="b"))
    good = fresh(bits(258, 42), "a")
    assert judge(REQUIRED, *arms, good | fresh(bits(258, 42), "b")).verdict is Verdict.PASSED
    assert judge(REQUIRED, *arms, good).verdict is Verdict.INCONCLUSIVE
    judgment = judge(REQUIRED, *arms, good | fresh(bits(298, 2), "b"))
    assert judgment.verdict is Verdict.NEEDS_RETUNING
    assert judgment.reason.startswith("b:")


def test_the_figures_are_those_of_the_bounds():
    candidate, right = [1, 1, 0, 1, 0] * 20, [1, 0, 1, 1, 0] * 20
    (figures,) = judge(POLICY, *three([1] * 100, candidate, [0] * 100), fresh(right)).suites
    fresh_comparison = figures.versus_fresh_adapter
    assert fresh_comparison.lower == 100 * lower_bound(100, 20, 20, 0.05)
    assert fresh_comparison.upper == 100 * upper_bound(100, 20, 20, 0.05)


def test_inferiority_tests_share_alpha_between_both_references():
    """The difference is significant at alpha but not at alpha / 2."""
    behind = 24
    bound = [upper_bound(300, behind + 5, 5, alpha) for alpha in (0.05, 0.025)]
    assert bound[0] < -0.05 < bound[1]
    candidate = bits(258, 42)
    right = candidate.copy()
    right[:5] = [0] * 5
    right[258 : 258 + behind + 5] = [1] * (behind + 5)
    judgment = judge(REQUIRED, *three(candidate, candidate, [0] * 300), fresh(right))
    assert judgment.verdict is Verdict.INCONCLUSIVE


ROWS = st.lists(st.tuples(*[st.booleans()] * 4), min_size=1, max_size=80)


@given(ROWS, st.sampled_from([2.0, 15.0, 40.0]), st.booleans(), st.data())
def test_one_more_correct_item_never_worsens_the_verdict(rows, margin, required, data):
    policy = GatePolicy(margin_points=margin, must_match_fresh=required)
    rows = [(True, True, False, True)] * data.draw(st.integers(0, 60)) + rows
    reference, candidate, bare, tuned = (list(arm) for arm in zip(*rows, strict=True))
    before = judge(policy, *three(reference, candidate, bare), fresh(tuned)).verdict
    wrong = [i for i, right in enumerate(candidate) if not right]
    if wrong:
        candidate[data.draw(st.sampled_from(wrong))] = True
    after = judge(policy, *three(reference, candidate, bare), fresh(tuned)).verdict
    if before is Verdict.PASSED:
        assert after is Verdict.PASSED
    if before is not Verdict.NEEDS_RETUNING:
        assert after is not Verdict.NEEDS_RETUNING


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_fingerprint_sha256": "old"}, "fresh adapter were evaluated on different bases"),
        ({"weights_sha256": BARE}, "comes from the bare base"),
        ({"suite_sha256": "other"}, "suite_sha256 differs"),
    ],
)
def test_results_that_cannot_be_compared_are_rejected(changes, message):
    other = {name: replace(e, **changes) for name, e in fresh(bits(258, 42)).items()}
    with pytest.raises(InvalidSpecError, match=message):
        judge(POLICY, *three(*A_PASSING), other)


def test_must_match_fresh_excludes_sequential():
    with pytest.raises(InvalidSpecError, match="complete suites"):
        GatePolicy(sequential=True, must_match_fresh=True)
