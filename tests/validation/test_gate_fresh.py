"""The gate with a freshly tuned adapter as a second reference on the new base."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.validation.test_gate import A_IDLE, A_KEPT, A_LOST, bits, merged, results, three
from trans_peft.domain.evaluation import BARE, GatePolicy, Verdict
from trans_peft.errors import InvalidSpecError
from trans_peft.validation.gate import judge
from trans_peft.validation.statistics.intervals import lower_bound, upper_bound

POLICY = GatePolicy(margin_points=5, alpha=0.05)
ASKED = replace(POLICY, must_match_fresh=True)


def fresh(right, suite="imports"):
    return results(right, suite, "fresh")


def test_its_score_stands_beside_and_decides_nothing_unasked():
    arms = three(*A_KEPT)
    alone, beside = judge(POLICY, *arms), judge(POLICY, *arms, fresh(bits(298, 2)))
    assert alone.verdict == beside.verdict == Verdict.PASSED
    (figures,) = beside.suites
    assert figures.versus_fresh_adapter.reference_score == pytest.approx(100 * 298 / 300)
    assert figures.versus_fresh_adapter.difference == pytest.approx(100 * (258 - 298) / 300)
    assert figures.versus_fresh_adapter.inferior
    assert "a freshly tuned adapter scores 99.3" in beside.reason
    assert replace(figures, versus_fresh_adapter=None) == alone.suites[0]


@pytest.mark.parametrize(
    ("arms", "right", "verdict"),
    [
        (A_KEPT, bits(258, 42), "passed"),
        (A_KEPT, bits(298, 2), "needs-retuning"),  # nothing lost, and far behind all the same
        (A_KEPT, bits(268, 32), "inconclusive"),
        (A_LOST, bits(200, 100), "needs-retuning"),
        (A_IDLE, bits(258, 42), "retire"),
    ],
)
def test_the_table_of_verdicts_where_the_policy_asks(arms, right, verdict):
    judgement = judge(ASKED, *three(*arms), fresh(right))
    assert judgement.verdict == verdict
    assert (judgement.suites[0].more_items > 0) == (verdict == "inconclusive")


def test_where_there_is_none_nothing_can_be_shown_against_it():
    judgement = judge(ASKED, *three(*A_KEPT))
    assert judgement.verdict is Verdict.INCONCLUSIVE
    assert "no adapter was tuned on the new base" in judgement.reason


def test_every_required_suite_is_compared():
    arms = merged(three(*A_KEPT, suite="a"), three(*A_KEPT, suite="b"))
    good = fresh(bits(258, 42), "a")
    assert judge(ASKED, *arms, good | fresh(bits(258, 42), "b")).verdict is Verdict.PASSED
    assert judge(ASKED, *arms, good).verdict is Verdict.INCONCLUSIVE
    judgement = judge(ASKED, *arms, good | fresh(bits(298, 2), "b"))
    assert judgement.verdict is Verdict.NEEDS_RETUNING
    assert judgement.reason.startswith("b:")


def test_the_figures_are_those_of_the_bounds():
    candidate, right = [1, 1, 0, 1, 0] * 20, [1, 0, 1, 1, 0] * 20
    (figures,) = judge(POLICY, *three([1] * 100, candidate, [0] * 100), fresh(right)).suites
    fresh_comparison = figures.versus_fresh_adapter
    assert fresh_comparison.lower == 100 * lower_bound(100, 20, 20, 0.05)
    assert fresh_comparison.upper == 100 * upper_bound(100, 20, 20, 0.05)


def test_a_second_reason_to_retune_shares_the_level():
    """Behind by just enough at alpha, not at alpha / 2."""
    behind = 24
    bound = [upper_bound(300, behind + 5, 5, alpha) for alpha in (0.05, 0.025)]
    assert bound[0] < -0.05 < bound[1]
    candidate = bits(258, 42)
    right = candidate.copy()
    right[:5] = [0] * 5
    right[258 : 258 + behind + 5] = [1] * (behind + 5)
    judgement = judge(ASKED, *three(candidate, candidate, [0] * 300), fresh(right))
    assert judgement.verdict is Verdict.INCONCLUSIVE


ROWS = st.lists(st.tuples(*[st.booleans()] * 4), min_size=1, max_size=80)


@given(ROWS, st.sampled_from([2.0, 15.0, 40.0]), st.booleans(), st.data())
def test_one_more_right_answer_on_the_new_base_never_turns_a_pass_into_less(
    rows, margin, asked, data
):
    policy = GatePolicy(margin_points=margin, must_match_fresh=asked)
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
    ("changes", "words"),
    [
        ({"base_fingerprint_sha256": "old"}, "fresh adapter were run on different bases"),
        ({"weights_sha256": BARE}, "made without one"),
        ({"suite_sha256": "other"}, "suite_sha256 differs"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(changes, words):
    other = {name: replace(e, **changes) for name, e in fresh(bits(258, 42)).items()}
    with pytest.raises(InvalidSpecError, match=words):
        judge(POLICY, *three(*A_KEPT), other)


def test_it_cannot_be_asked_for_in_a_sequential_policy():
    with pytest.raises(InvalidSpecError, match="whole suites"):
        GatePolicy(sequential=True, must_match_fresh=True)
