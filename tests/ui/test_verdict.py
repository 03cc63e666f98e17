"""Explained verdicts: their meanings, their pictures, and the items whose result changed."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ui.fleets import POLICY, SUITES, ExampleFleet, answers, evaluation
from trans_peft.domain.evaluation import Comparison, Prefix, Verdict
from trans_peft.errors import IntegrityError
from trans_peft.ui.formats import duration, points
from trans_peft.ui.picture import picture
from trans_peft.ui.verdict import MEANINGS, suites_of
from trans_peft.validation.gate import judge

PAGE = (Path(__file__).parents[2] / "docs" / "verdicts.md").read_text()


@pytest.mark.parametrize("verdict", Verdict)
def test_the_meanings_are_those_of_the_page_on_verdicts(verdict):
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{verdict}` |"))
    plain = re.sub(r"\[([^]]+)\]\([^)]+\)|`([^`]+)`|\*\*([^*]+)\*\*", r"\1\2\3", row)
    _, _, condition, _, do, _ = (cell.strip() for cell in plain.split("|"))
    meaning = MEANINGS[verdict]
    assert (meaning.condition, meaning.do) == (condition, do)


def comparison(difference, lower, upper, **flags):
    tests = ("non_inferior", "inferior", "superior", "reference_non_inferior")
    return Comparison(
        reference_score=50.0, items=100, discordant=10, difference=difference, lower=lower,
        upper=upper, inferiority_bound=upper, **{name: flags.get(name, False) for name in tests},
    )  # fmt: skip


reals = st.floats(-100, 100)


@given(reals, reals, reals, st.none() | st.floats(-20, 20))
def test_positions_keep_the_order_of_the_figures(a, b, c, limit):
    lower, difference, upper = sorted((a, b, c))
    found = picture(comparison(difference, lower, upper), limit, "open")
    placed = [(0.0, found.zero), (lower, found.lower), (difference, found.difference)]
    placed += [(upper, found.upper)] + ([] if limit is None else [(limit, found.limit)])
    positions = [position for _, position in sorted(placed)]
    assert positions == sorted(positions)
    assert all(0 < position < 100 for position in positions)
    assert 1 <= len(found.ticks) <= 8
    assert (found.zero, "0") in found.ticks


def test_the_axis_is_linear():
    found = picture(comparison(-2.0, -10.0, 10.0), -5.0, "open")
    step = (found.upper - found.lower) / 20
    assert found.zero == pytest.approx(found.lower + 10 * step, abs=0.02)
    assert found.limit == pytest.approx(found.lower + 5 * step, abs=0.02)
    assert found.difference == pytest.approx(found.lower + 8 * step, abs=0.02)


def test_bounds_that_do_not_exist_reach_the_end():
    found = picture(comparison(-1.0, float("-inf"), float("inf")), None, "open")
    assert (found.lower, found.upper) == (4.0, 96.0)
    assert found.is_open_below and found.is_open_above


@given(st.floats(-100, 100))
def test_points_are_rounded_and_signed(value):
    text = points(value).replace("\N{MINUS SIGN}", "-")
    assert float(text) == round(value, 1) + 0.0
    assert (text[0] in "+-") == (round(value, 1) != 0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "unknown"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (95, "1 min 35 s"),
        (3600, "1 h"),
        (7800, "2 h 10 min"),
        (200_000, "2 d 7 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# Changed items.


@pytest.fixture
def fleet(tmp_path):
    fleet = ExampleFleet(tmp_path)
    fleet.add_base("v1")
    fleet.add_base("v2")
    fleet.train("chat", "v1")
    return fleet


def suite_view(fleet, store=None):
    adapter = fleet.platform.registry.adapter("chat")
    base = fleet.bases["v2"]
    (found,) = suites_of(
        adapter, base, adapter.outcome_on(base), store or fleet.platform.evaluations
    )
    return found


def test_changed_items_are_those_of_the_two_evaluations(fleet):
    fleet.transfer("chat", "v2", {"exceptions": (12, 9)})
    flips = suite_view(fleet).flips
    before, after = answers(300), answers(300, 12, 9)
    changed = [n for n in range(400) if before[n] != after[n]]
    assert flips.lost == tuple(f"exceptions-{n:03}" for n in changed if before[n])
    assert flips.gained == tuple(f"exceptions-{n:03}" for n in changed if after[n])
    figures = suite_view(fleet).comparisons[0]
    assert len(flips.lost) + len(flips.gained) == figures.discordant
    assert flips.compared == figures.items == 400


@pytest.mark.parametrize(("kept", "missing"), [("v1", "v2"), ("v2", "v1")])
def test_a_missing_evaluation_is_named(fleet, kept, missing):
    fleet.transfer("chat", "v2", {"exceptions": (12, 9)})

    class OneMissing:
        def get(self, key):
            found = fleet.platform.evaluations.get(key)
            is_kept = found.base_fingerprint_sha256 == fleet.bases[kept].fingerprint_sha256
            return found if is_kept else None

    flips = suite_view(fleet, OneMissing()).flips
    assert flips.problem == f"the evaluation on smollm2/{missing} is not stored"
    assert flips.lost == flips.gained == ()


def test_an_evaluation_that_cannot_be_read_is_reported(fleet):
    fleet.transfer("chat", "v2", {"exceptions": (12, 9)})

    class Broken:
        def get(self, key):
            raise IntegrityError("the file was changed")

    assert "the file was changed" in suite_view(fleet, Broken()).flips.problem


def test_a_part_of_a_suite_is_looked_up_by_its_own_key(fleet):
    fleet.transfer("chat", "v2", {"exceptions": (12, 9)})
    adapter, base = fleet.platform.registry.adapter("chat"), fleet.bases["v2"]
    outcome = adapter.outcome_on(base)
    prefix = Prefix(400, "seed")
    whole = fleet.platform.evaluations.get(
        SUITES["exceptions"].evaluation_key(outcome.weights_sha256, base.fingerprint_sha256)
    )
    part = replace(whole, items=whole.items[:50], prefix=prefix)
    fleet.platform.evaluations.put(part)
    (figures,) = outcome.judgment.suites
    early = replace(
        figures, prefix=prefix, versus_old_base=replace(figures.versus_old_base, items=50)
    )
    outcome = replace(outcome, judgment=replace(outcome.judgment, suites=(early,)))
    (found,) = suites_of(adapter, base, outcome, fleet.platform.evaluations)
    assert (found.flips.compared, found.items, found.suite_items) == (50, 50, 400)
    assert len(found.flips.lost) == 12


def test_a_judgment_records_the_margin_and_the_level():
    suite = SUITES["exceptions"]
    fleet_bases = [replace_base(n) for n in (1, 2)]
    before, after = (
        {suite.name: evaluation(suite, "w", base, answers(300))} for base in fleet_bases
    )
    bare = {suite.name: evaluation(suite, "bare", fleet_bases[1], answers(40))}
    found = judge(replace(POLICY, margin_points=3.0, alpha=0.01), before, after, bare)
    assert (found.margin_points, found.alpha) == (3.0, 0.01)


def replace_base(number):
    from trans_peft.domain.base import BaseVersion

    return BaseVersion("smollm2", f"v{number}", "m://", number, str(number) * 64, ready=True)
