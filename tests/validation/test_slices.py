"""Slices of a suite: each is reported, and a policy may require some."""

from dataclasses import replace

import pytest

from tests.validation.statistics.test_clusters import clustered
from tests.validation.statistics.test_sequential import EARLY, drive
from tests.validation.test_gate import POLICY, merged, results, three
from trans_peft.domain.evaluation import GatePolicy, Verdict
from trans_peft.errors import InvalidSpecError
from trans_peft.validation.gate import judge
from trans_peft.validation.statistics.intervals import lower_bound, smallest_sample, upper_bound

ITEMS = 600


def sliced(evaluations, sizes):
    """The evaluations with the first items in the first slice, and so on."""
    names = [name for name, size in sizes.items() for _ in range(size)]
    return {
        suite: replace(
            evaluation,
            items=tuple(
                replace(item, slice=name)
                for item, name in zip(evaluation.items, names, strict=True)
            ),
        )
        for suite, evaluation in evaluations.items()
    }


def arms(lost, sizes, gained=0):
    """An adapter that loses the first `lost` items, and gains the last `gained` ones."""
    reference = [1] * (ITEMS - gained) + [0] * gained
    candidate = [0] * lost + [1] * (ITEMS - lost)
    return [sliced(arm, sizes) for arm in three(reference, candidate, [0] * ITEMS)]


HALVES = {"German": 200, "English": 400}
REQUIRED = replace(POLICY, required_slices=("imports/German",))


def test_every_slice_has_the_figures_of_its_items():
    judgment = judge(POLICY, *arms(lost=30, sizes=HALVES, gained=40))
    english, german = judgment.suites[0].slices
    assert (english.name, german.name) == ("English", "German")
    found = german.versus_old_base
    assert (found.items, found.discordant, found.difference, german.score) == (200, 30, -15, 85)
    assert found.lower == 100 * lower_bound(200, 30, 0, 0.05)
    assert found.upper == 100 * upper_bound(200, 30, 0, 0.05)
    assert (english.versus_old_base.difference, english.score) == (10, 100)
    assert found.inferior and not german.required


def test_a_loss_on_a_slice_that_is_not_required_is_named_and_does_not_decide():
    judgment = judge(POLICY, *arms(lost=30, sizes=HALVES, gained=40))
    assert judgment.verdict is Verdict.PASSED
    assert "not required, but inferior: slice German of imports, lost at least" in judgment.reason


def test_a_loss_on_a_required_slice_needs_retuning():
    judgment = judge(REQUIRED, *arms(lost=30, sizes=HALVES, gained=40))
    assert judgment.verdict is Verdict.NEEDS_RETUNING
    assert "slice German: lost at least" in judgment.reason
    assert "not required" not in judgment.reason


def test_a_required_slice_without_loss_passes():
    judgment = judge(REQUIRED, *arms(lost=0, sizes=HALVES))
    assert judgment.verdict is Verdict.PASSED
    assert "slice German: lost at most 1.33 points" in judgment.reason


def test_the_test_of_a_slice_shares_the_level_of_the_inferiority_tests():
    assert REQUIRED.levels(1) == (0.05, 0.025)
    assert replace(REQUIRED, max_negative_flip_points=3).levels(2) == (0.05, 0.01)


@pytest.mark.parametrize(
    ("items", "verdict"), [(3, "inconclusive"), (51, "inconclusive"), (52, "passed")]
)
def test_a_slice_that_is_too_small_for_any_result_says_so(items, verdict):
    judgment = judge(REQUIRED, *arms(lost=0, sizes={"German": items, "English": ITEMS - items}))
    assert judgment.verdict == verdict
    too_small = (
        f"slice German has {items} items, too few for any result: a margin of 5 points needs at "
        "least 52"
    )
    assert (too_small in judgment.reason) == (verdict == "inconclusive")


@pytest.mark.parametrize("margin", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("alpha", [0.0125, 0.05])
def test_the_smallest_sample_is_the_first_that_can_pass(margin, alpha):
    n = smallest_sample(margin, alpha)
    assert lower_bound(n, 0, 0, alpha) > -margin >= lower_bound(n - 1, 0, 0, alpha)


def test_an_undecided_slice_states_how_many_items_would_decide():
    judgment = judge(REQUIRED, *arms(lost=6, sizes=HALVES, gained=8))
    assert judgment.verdict is Verdict.INCONCLUSIVE
    (german,) = judgment.suites[0].required_slices
    assert german.items_needed > 200
    assert judgment.suites[0].items_needed == german.items_needed * 3
    assert f"about {german.items_needed - 200:,} more items of it would decide" in judgment.reason


def test_the_clusters_of_a_slice_count():
    found = judge(POLICY, *(clustered(arm, 10) for arm in arms(20, HALVES)))
    assert [part.clusters for part in found.suites[0].slices] == [40, 20]
    alone = judge(POLICY, *arms(20, HALVES)).suites[0].slices[1].versus_old_base
    assert found.suites[0].slices[1].versus_old_base.lower < alone.lower


def test_a_sequential_policy_reports_slices_of_the_evaluated_items():
    reference, *others = arms(lost=200, sizes=HALVES)
    _, candidate, bare = drive(EARLY, reference, *others)
    (suite,) = judge(EARLY, reference, candidate, bare).suites
    evaluated = candidate["imports"].items
    for part in suite.slices:
        items = [item for item in evaluated if item.slice == part.name]
        assert part.versus_old_base.items == len(items)
        assert part.score == pytest.approx(100 * sum(i.correct for i in items) / len(items))
        assert part.versus_old_base.lower <= part.versus_old_base.difference


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        (("imports/French",), "the suite has the slices English, German"),
        (("exports/German",), "the suite is not required"),
    ],
)
def test_a_slice_that_does_not_exist_is_an_error(slices, message):
    with pytest.raises(InvalidSpecError, match=message):
        judge(replace(POLICY, required_slices=slices), *arms(0, HALVES))


def test_a_suite_without_slices_is_named():
    evaluations = three([1] * 300, [1] * 300, [0] * 300)
    with pytest.raises(InvalidSpecError, match="none: its data names no column `slice`"):
        judge(REQUIRED, *evaluations)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"required_slices": ("German",)}, "must have the form SUITE/SLICE"),
        ({"required_slices": ("a/b",), "sequential": True}, "exclude each other"),
        ({"required_slices": ("a/b",), "required_suites": ("c",)}, "'a/b' is not required"),
    ],
)
def test_an_impossible_policy_is_an_error(fields, message):
    with pytest.raises(InvalidSpecError, match=message):
        GatePolicy(**fields)


def test_slices_of_other_suites_do_not_decide():
    first = arms(0, HALVES)
    extra = [
        sliced(arm, HALVES)
        for arm in three([1] * ITEMS, [0] * 300 + [1] * 300, [0] * ITEMS, "extra")
    ]
    policy = replace(REQUIRED, required_suites=("imports",))
    judgment = judge(policy, *merged(first, extra))
    assert judgment.verdict is Verdict.PASSED
    assert results([1])["imports"].items[0].slice == ""
