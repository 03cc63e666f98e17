from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.validation.test_gate import (
    A_INFERIOR,
    A_PASSING,
    GOOD,
    ONE_SUITE,
    POLICY,
    POOR,
    TWO_SUITES,
    bits,
    changed,
    merged,
    three,
)
from trans_peft.domain.evaluation import GatePolicy, ItemResult, Prefix, Verdict
from trans_peft.errors import InvalidSpecError
from trans_peft.validation.gate import judge
from trans_peft.validation.statistics.intervals import items_to_decide
from trans_peft.validation.statistics.order import order, order_seed
from trans_peft.validation.statistics.sequential import (
    EvaluatedModel,
    SequentialGate,
    batch_ends,
)

EARLY = replace(POLICY, sequential=True)


def drive(policy, reference, candidate, bare):
    """Serve all requests. Returns the gate and the evaluated parts: candidate, then bare base."""
    (base,) = {evaluation.base_fingerprint_sha256 for evaluation in candidate.values()}
    gate = SequentialGate(policy, reference, base)
    answers = {EvaluatedModel.CANDIDATE: candidate, EvaluatedModel.BARE: bare}
    evaluated = {EvaluatedModel.CANDIDATE: {}, EvaluatedModel.BARE: {}}
    while (request := gate.next_request()) is not None:
        whole = answers[request.model][request.suite]
        results = {item.id: item for item in whole.items}
        items = [results[id_] for id_ in request.ids]
        gate.observe(request.suite, request.model, items)
        evaluated[request.model].setdefault(request.suite, []).extend(items)
    return gate, *(
        {
            name: replace(
                answers[model][name],
                items=tuple(items),
                prefix=Prefix(n, gate.suites[name].seed)
                if len(items) < (n := len(reference[name].items))
                else None,
            )
            for name, items in evaluated[model].items()
        }
        for model in EvaluatedModel
    )


CLEAR = [
    "kept, far better than the bare base",
    "gained",
    "lost twenty points",
    "collapsed, bare base as good",
    "kept, bare base as good",
    "undecided, bare base as good",
    "too few items for the margin",
]


@pytest.mark.parametrize("case", CLEAR)
def test_clear_cases_have_the_verdict_of_the_fixed_size_test(case):
    *arms, verdict = ONE_SUITE[case]
    arms = three(*arms)
    gate, candidate, bare = drive(EARLY, *arms)
    assert gate.verdict == verdict
    judgment = judge(EARLY, arms[0], candidate, bare)
    assert judgment.verdict == verdict
    assert judgment == judge(EARLY, *arms)  # complete and partial results lead to the same judgment
    (figures,) = judgment.suites
    assert figures.items == len(candidate["imports"].items)
    assert figures.prefix == Prefix(len(arms[0]["imports"].items), gate.suites["imports"].seed)
    assert f"{figures.items} of {figures.prefix.suite_items} items" in judgment.reason
    assert "sequential test, one-sided level 5 %" in judgment.reason


def test_clear_cases_need_only_some_items():
    item_counts = {}
    for case in ("gained", "lost twenty points", "collapsed, bare base as good"):
        *arms, _ = ONE_SUITE[case]
        _, candidate, _ = drive(EARLY, *three(*arms))
        item_counts[case] = len(candidate["imports"].items)
    assert item_counts == {
        "gained": 32,
        "lost twenty points": 96,
        "collapsed, bare base as good": 32,
    }


@pytest.mark.parametrize(("first", "second", "verdict"), TWO_SUITES)
def test_every_required_suite_must_pass(first, second, verdict):
    arms = merged(three(*first, suite="a"), three(*second, suite="b"))
    gate, candidate, bare = drive(EARLY, *arms)
    assert gate.verdict == verdict
    assert judge(EARLY, arms[0], candidate, bare).verdict == verdict


def test_a_loss_on_the_first_suite_skips_the_second():
    arms = merged(three(*A_INFERIOR, suite="a"), three(*A_PASSING, suite="b"))
    _, candidate, bare = drive(EARLY, *arms)
    assert set(candidate) == {"a"}
    judgment = judge(EARLY, arms[0], candidate, bare)
    assert (judgment.verdict, len(judgment.suites)) == (Verdict.NEEDS_RETUNING, 1)


def test_the_bare_base_is_evaluated_only_if_needed():
    arms = three(*A_PASSING)
    _, candidate, bare = drive(EARLY, *arms)
    assert 0 < len(bare["imports"].items) < len(candidate["imports"].items)
    gate, candidate, bare = drive(replace(EARLY, must_beat_bare=False), *arms)
    assert (gate.verdict, bare) == (Verdict.PASSED, {})
    judgment = judge(replace(EARLY, must_beat_bare=False), arms[0], candidate, {})
    assert judgment.verdict is Verdict.PASSED


def test_evaluation_stops_for_futility():
    """The loss equals the margin, and the adapter is far better than the bare base."""
    candidate = [0] * 125 + [1] * 575 + [1] * 75 + [0] * 225
    arms = three([1] * 700 + [0] * 300, candidate, [0] * 1000)
    gate, candidate, bare = drive(EARLY, *arms)
    assert gate.verdict is Verdict.INCONCLUSIVE
    assert len(candidate["imports"].items) < 900
    judgment = judge(EARLY, arms[0], candidate, bare)
    assert "evaluation stopped early" in judgment.reason
    assert judgment.suites[0].more_items > 0


def test_nothing_is_evaluated_if_every_test_is_futile():
    policy = replace(EARLY, margin_points=1.0, alpha=0.001)
    gate, candidate, bare = drive(policy, *three([1] * 3, [1] * 3, [0] * 3))
    assert (gate.verdict, candidate, bare) == (Verdict.INCONCLUSIVE, {}, {})
    judgment = judge(policy, three([1] * 3, [1] * 3, [0] * 3)[0], {}, {})
    assert judgment.verdict is Verdict.INCONCLUSIVE
    assert "no item was evaluated" in judgment.reason
    needed = items_to_decide(200, 15, 15, -0.01, 0.001)
    assert needed > 10_000
    assert f"about {needed:,} would" in judgment.reason


def test_a_suite_that_is_not_required_is_evaluated_completely():
    policy = replace(EARLY, required_suites=("a",))
    reference, candidate, bare = merged(three(*A_PASSING, suite="a"), three(*A_INFERIOR, suite="b"))
    gate = SequentialGate(policy, reference, "new")
    assert set(gate.suites) == {"a"}
    judgment = judge(policy, reference, candidate, bare)
    assert judgment.verdict is Verdict.PASSED
    assert [s.prefix is None for s in judgment.suites] == [False, True]
    assert "not required, but inferior: b:" in judgment.reason


ROWS = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=60)
POLICIES = st.builds(
    GatePolicy,
    margin_points=st.sampled_from([5.0, 15.0, 40.0]),
    alpha=st.sampled_from([0.05, 0.2]),
    must_beat_bare=st.booleans(),
    sequential=st.just(True),
)


@given(ROWS, ROWS, POLICIES)
@settings(deadline=None, max_examples=10)
def test_every_verdict_follows_from_its_tests(first, second, policy):
    arms = merged(
        three(*zip(*first, strict=True), suite="a"), three(*zip(*second, strict=True), suite="b")
    )
    gate, candidate, bare = drive(policy, *arms)
    tests = gate.suites.values()
    passed = all(
        t.non_inferior.is_significant and (t.superior.is_significant or not policy.must_beat_bare)
        for t in tests
    )
    inferior, baseline_non_inferior = (
        any(t.inferior.is_significant for t in tests),
        all(t.baseline_non_inferior.is_significant for t in tests),
    )
    expected = (
        "passed" if passed
        else "needs-retuning" if inferior
        else "retire" if baseline_non_inferior
        else "inconclusive"
    )  # fmt: skip
    assert gate.verdict == expected
    judgment = judge(policy, arms[0], candidate, bare)
    assert judgment.verdict == expected
    for s in judgment.suites:
        test = gate.suites[s.suite]
        old, bare = s.versus_old_base, s.versus_bare_base
        assert old.non_inferior == bool(test.non_inferior.is_significant)
        assert old.inferior == bool(test.inferior.is_significant)
        assert (old.lower >= -policy.margin_points) == old.non_inferior
        assert (bare is None) == (not test.bare_differences)
        if bare is not None:
            assert bare.superior == bool(test.superior.is_significant)
            assert bare.reference_non_inferior == bool(test.baseline_non_inferior.is_significant)
        assert len(test.changes) == s.items == len(candidate[s.suite].items)


# Order and evaluation keys.


@given(st.sets(st.text(min_size=1), max_size=50), st.text())
def test_an_order_has_every_item_once_and_ignores_the_input_order(ids, seed):
    found = order(ids, seed)
    assert sorted(found) == sorted(ids)
    assert found == order(sorted(ids, reverse=True), seed)


def test_every_item_is_equally_likely_to_come_early():
    ids = [f"item-{i}" for i in range(20)]
    counts = dict.fromkeys(ids, 0)
    for seed in range(2000):
        for id_ in order(ids, str(seed))[:5]:
            counts[id_] += 1
    assert all(400 < count < 600 for count in counts.values())  # expected 500, standard error 19


def test_every_suite_and_base_has_its_own_order():
    assert order_seed("suite", "base") == order_seed("suite", "base")
    assert len({order_seed(s, b) for s in ("x", "y") for b in ("x", "y")}) == 4


@pytest.mark.parametrize(
    ("items", "ends"), [(1, [32]), (32, [32]), (33, [32, 64]), (1319, range(83, 1329, 83))]
)
def test_there_are_at_most_16_batches_of_at_least_32_items(items, ends):
    assert list(batch_ends(items)) == list(ends)
    assert len(batch_ends(items)) <= 16 and batch_ends(items)[-1] >= items


def part(evaluation, count, seed="seed"):
    return replace(
        evaluation, items=evaluation.items[:count], prefix=Prefix(len(evaluation.items), seed)
    )


def test_a_part_has_its_own_key_and_does_not_replace_the_whole():
    reference, candidate, bare = three(*A_PASSING)
    whole = candidate["imports"]
    keys = {whole.key, part(whole, 32).key, part(whole, 64).key, part(whole, 32, "other").key}
    assert len(keys) == 4
    with pytest.raises(InvalidSpecError, match="has all items of the suite"):
        part(whole, 300)
    with pytest.raises(InvalidSpecError, match="268 items are not in all evaluations"):
        judge(POLICY, reference, {"imports": part(whole, 32)}, bare)


def test_sequential_changes_the_hash_and_its_default_does_not():
    """Stored verdicts use these hashes, which were computed before `sequential` existed."""
    assert GatePolicy().sha256 == (
        "4c4a73e348cccc60615f829a4310c6481d5cf10c0b997f673bf975c3f611eeb6"
    )
    assert GatePolicy(3.0, 0.01, ("a", "b"), False).sha256 == (
        "225c32f25f5652a35dec3910f293940c5a146c8e85efaf3523aae5f13cf83795"
    )
    assert GatePolicy(sequential=True).sha256 != GatePolicy().sha256


# Rejected input.


def test_results_that_end_too_early_are_rejected():
    reference, candidate, bare = three(*A_PASSING)
    short = changed(candidate, items=candidate["imports"].items[:40])
    with pytest.raises(InvalidSpecError, match="candidate has too few results for a verdict"):
        judge(EARLY, reference, short, bare)
    with pytest.raises(InvalidSpecError, match="bare has too few results for a verdict"):
        judge(EARLY, reference, candidate, changed(bare, items=bare["imports"].items[:1]))


def test_items_without_a_result_on_the_old_base_are_rejected():
    reference, candidate, bare = three(*A_PASSING)
    short = changed(reference, items=reference["imports"].items[:299])
    with pytest.raises(InvalidSpecError, match="1 items are not in the evaluation on the old base"):
        judge(EARLY, short, candidate, bare)


def test_results_of_other_items_than_requested_are_rejected():
    gate = SequentialGate(EARLY, three(GOOD, bits(255, 45), POOR)[0], "new")
    request = gate.next_request()
    later = gate.suites["imports"].order[-len(request.ids) :]
    with pytest.raises(InvalidSpecError, match="results of other items than the next ones"):
        gate.observe("imports", EvaluatedModel.CANDIDATE, [ItemResult(id_, True) for id_ in later])
