import re
from collections import ChainMap
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trans_peft.domain.evaluation import (
    BARE,
    Comparison,
    Evaluation,
    GatePolicy,
    ItemResult,
    Verdict,
)
from trans_peft.errors import InvalidSpecError
from trans_peft.validation.gate import judge
from trans_peft.validation.statistics.intervals import lower_bound, upper_bound

POLICY = GatePolicy(margin_points=5, alpha=0.05)


def results(right, suite="imports", weights="adapter", base="new"):
    """Return a mapping of one suite to an evaluation with correct (1) and wrong (0) items."""
    items = tuple(ItemResult(f"item-{i}", bool(bit)) for i, bit in enumerate(right))
    return {suite: Evaluation(suite, weights, base, f"hash of {suite}", "greedy", items)}


def three(reference, candidate, bare, suite="imports"):
    return (
        results(reference, suite, base="old"),
        results(candidate, suite),
        results(bare, suite, BARE),
    )


def merged(*triples):
    return tuple(dict(ChainMap(*parts)) for parts in zip(*triples, strict=True))


def bits(right, wrong, shift=0):
    row = [1] * right + [0] * wrong
    return row[shift:] + row[:shift]


GOOD, POOR = bits(260, 40), bits(20, 280)

ONE_SUITE = {
    "kept, far better than the bare base": (GOOD, bits(258, 42), POOR, "passed"),
    "gained": (GOOD, bits(300, 0), POOR, "passed"),
    "lost twenty points": (GOOD, bits(200, 100), POOR, "needs-retuning"),
    "collapsed, bare base as good": (GOOD, bits(0, 300), POOR, "needs-retuning"),
    "kept, bare base as good": (GOOD, bits(258, 42), bits(262, 38), "retire"),
    "undecided, bare base as good": (GOOD, bits(252, 48, 20), bits(252, 48, 20), "retire"),
    "undecided, better than the bare base": (GOOD, bits(250, 50, 20), POOR, "inconclusive"),
    "kept, bare base undecided": (GOOD, bits(258, 42), bits(250, 50, 30), "inconclusive"),
    "too few items for the margin": ([1] * 30, [1] * 30, [0] * 30, "inconclusive"),
}


@pytest.mark.parametrize("case", ONE_SUITE)
def test_the_table_of_verdicts_with_one_suite(case):
    *arms, verdict = ONE_SUITE[case]
    judgment = judge(POLICY, *three(*arms))
    assert judgment.verdict == verdict
    assert "imports" in judgment.reason and "level 5 %" in judgment.reason
    undecided = judgment.suites[0].more_items > 0
    assert undecided == (verdict == "inconclusive")


A_PASSING = (GOOD, bits(258, 42), POOR)
A_INFERIOR = (GOOD, bits(200, 100), POOR)
A_UNDECIDED = (GOOD, bits(250, 50, 20), POOR)
A_REDUNDANT = (GOOD, bits(258, 42), bits(262, 38))

TWO_SUITES = [
    (A_PASSING, A_PASSING, "passed"),
    (A_PASSING, A_INFERIOR, "needs-retuning"),
    (A_REDUNDANT, A_INFERIOR, "needs-retuning"),
    (A_PASSING, A_UNDECIDED, "inconclusive"),
    (A_REDUNDANT, A_REDUNDANT, "retire"),
    (A_PASSING, A_REDUNDANT, "inconclusive"),
]


@pytest.mark.parametrize(("first", "second", "verdict"), TWO_SUITES)
def test_every_required_suite_must_pass(first, second, verdict):
    arms = merged(three(*first, suite="a"), three(*second, suite="b"))
    assert judge(POLICY, *arms).verdict == verdict


def test_more_items_are_given_for_the_undecided_suite_only():
    judgment = judge(POLICY, *merged(three(*A_PASSING, suite="a"), three(*A_UNDECIDED, suite="b")))
    assert [s.more_items > 0 for s in judgment.suites] == [False, True]
    assert judgment.reason.startswith("b:")


def test_the_reason_states_that_more_items_will_not_decide():
    judgment = judge(POLICY, *merged(three(*A_PASSING, suite="a"), three(*A_REDUNDANT, suite="b")))
    assert [s.more_items for s in judgment.suites] == [0, 0]
    assert "more items will not decide" in judgment.reason


def test_a_loss_on_a_suite_that_is_not_required_is_reported_only():
    policy = replace(POLICY, required_suites=("a",))
    judgment = judge(policy, *merged(three(*A_PASSING, suite="a"), three(*A_INFERIOR, suite="b")))
    assert judgment.verdict is Verdict.PASSED
    assert [s.suite for s in judgment.suites] == ["a", "b"]
    assert "not required, but inferior: b:" in judgment.reason


def test_inferiority_tests_share_alpha_among_the_required_suites():
    """The loss is significant at alpha but not at alpha / 2."""
    inferior = 24
    assert (
        upper_bound(300, inferior + 5, 5, 0.05) < -0.05 < upper_bound(300, inferior + 5, 5, 0.025)
    )
    candidate = [0] * (inferior + 5) + [1] * (260 - inferior - 5) + [1] * 5 + [0] * 35
    alone = three(GOOD, candidate, POOR, suite="a")
    assert judge(POLICY, *alone).verdict is Verdict.NEEDS_RETUNING
    both = merged(alone, three(*A_PASSING, suite="b"))
    judgment = judge(POLICY, *both)
    assert judgment.verdict is Verdict.INCONCLUSIVE
    assert judgment.suites[0].more_items > 0


def test_bare_results_are_optional_without_must_beat_bare():
    reference, candidate, _ = three(*A_PASSING)
    judgment = judge(replace(POLICY, must_beat_bare=False), reference, candidate, {})
    assert judgment.verdict is Verdict.PASSED
    assert judgment.suites[0].versus_bare_base is None


def test_an_adapter_equal_to_the_bare_base_passes_without_must_beat_bare():
    policy = replace(POLICY, must_beat_bare=False)
    assert judge(policy, *three(*A_REDUNDANT)).verdict is Verdict.PASSED


def test_the_figures_are_those_of_the_bounds():
    reference, candidate, bare = [1, 1, 1, 0, 0] * 20, [1, 1, 0, 1, 0] * 20, [0, 1, 0, 0, 0] * 20
    (figures,) = judge(POLICY, *three(reference, candidate, bare)).suites
    assert (figures.items, figures.score) == (100, 60)
    lower, upper = (100 * bound(100, 20, 20, 0.05) for bound in (lower_bound, upper_bound))
    assert figures.versus_old_base == Comparison(
        reference_score=60,
        items=100,
        discordant=40,
        difference=0,
        lower=lower,
        upper=upper,
        inferiority_bound=upper,
        non_inferior=False,
        inferior=False,
        superior=False,
        reference_non_inferior=False,
    )
    lower, upper = (100 * bound(100, 0, 40, 0.05) for bound in (lower_bound, upper_bound))
    assert figures.versus_bare_base == Comparison(
        reference_score=20,
        items=100,
        discordant=40,
        difference=40,
        lower=lower,
        upper=upper,
        inferiority_bound=upper,
        non_inferior=True,
        inferior=False,
        superior=True,
        reference_non_inferior=False,
    )
    assert 0 < figures.power < 1


def test_items_are_paired_by_id():
    reference, candidate, bare = three(GOOD, bits(255, 45, 3), POOR)
    turned = {k: replace(v, items=v.items[::-1]) for k, v in candidate.items()}
    assert judge(POLICY, reference, candidate, bare) == judge(POLICY, reference, turned, bare)


# Properties.

ROWS = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=80)
POLICIES = st.builds(
    GatePolicy,
    margin_points=st.sampled_from([2.0, 5.0, 15.0, 40.0]),
    alpha=st.sampled_from([0.01, 0.05, 0.2]),
    must_beat_bare=st.booleans(),
)


@given(ROWS, POLICIES, st.data())
def test_one_more_correct_item_never_worsens_the_verdict(rows, policy, data):
    rows = [(True, True, False)] * data.draw(st.integers(0, 60)) + rows
    reference, candidate, bare = (list(arm) for arm in zip(*rows, strict=True))
    before = judge(policy, *three(reference, candidate, bare)).verdict
    wrong = [i for i, right in enumerate(candidate) if not right]
    if wrong:
        candidate[data.draw(st.sampled_from(wrong))] = True
    after = judge(policy, *three(reference, candidate, bare)).verdict
    if before is Verdict.PASSED:
        assert after is Verdict.PASSED
    if before is not Verdict.NEEDS_RETUNING:
        assert after is not Verdict.NEEDS_RETUNING


@given(ROWS, POLICIES)
def test_every_verdict_follows_from_its_figures(rows, policy):
    judgment = judge(policy, *three(*zip(*rows, strict=True)))
    (s,) = judgment.suites
    old, bare, margin = s.versus_old_base, s.versus_bare_base, policy.margin_points
    passed = old.lower > -margin and (not policy.must_beat_bare or bare.lower > 0)
    inferior, baseline_non_inferior = old.upper < -margin, bare.upper < margin
    expected = (
        "passed" if passed
        else "needs-retuning" if inferior
        else "retire" if baseline_non_inferior
        else "inconclusive"
    )  # fmt: skip
    assert judgment.verdict == expected
    assert (s.more_items > 0) == (expected == "inconclusive")
    for found in (old, bare):
        assert found.non_inferior == (found.lower > -margin)
        assert found.inferior == (found.inferiority_bound < -margin)
        assert found.superior == (found.lower > 0)
        assert found.reference_non_inferior == (found.upper < margin)
    assert not re.search(r"nan|inf[^e]|None", judgment.reason)


# Results that cannot be compared.


def changed(arm, **values):
    return {name: replace(evaluation, **values) for name, evaluation in arm.items()}


INCOMPARABLE = {
    "suite_sha256 differs": lambda r, c, b: (changed(r, suite_sha256="other"), c, b),
    "decoding_sha256 differs": lambda r, c, b: (r, c, changed(b, decoding_sha256="other")),
    "no result: adapter on the new base": lambda r, c, b: (r, {}, b),
    "no result: adapter on its old base": lambda r, c, b: ({**r}, {**c, "x": c["imports"]}, b),
    "no result: bare new base": lambda r, c, b: (r, c, {}),
    "different bases": lambda r, c, b: (r, c, changed(b, base_fingerprint_sha256="other")),
    "comes from an adapter": lambda r, c, b: (r, c, changed(b, weights_sha256="adapter")),
    "2 items are not in all evaluations: item-298, item-299": lambda r, c, b: (
        r,
        changed(c, items=c["imports"].items[:298]),
        b,
    ),
}


@pytest.mark.parametrize("problem", INCOMPARABLE)
def test_results_that_cannot_be_compared_are_rejected(problem):
    with pytest.raises(InvalidSpecError, match=problem):
        judge(POLICY, *INCOMPARABLE[problem](*three(*A_PASSING)))


def test_an_error_lists_all_problems():
    reference, candidate, bare = three(*A_PASSING)
    bare = changed(bare, decoding_sha256="other", weights_sha256="adapter")
    with pytest.raises(InvalidSpecError) as error:
        judge(replace(POLICY, required_suites=("imports", "absent")), reference, candidate, bare)
    for part in ("decoding_sha256", "comes from an adapter", "suite 'absent': no result"):
        assert part in str(error.value)


def test_an_empty_set_of_suites_is_rejected():
    with pytest.raises(InvalidSpecError, match="no required suite has results"):
        judge(POLICY, {}, {}, {})
