"""e-values of sequential verdicts, and the false discovery rate of a fleet."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fleet_claim import simulate
from tests.validation.statistics.test_sequential import EARLY, drive
from tests.validation.test_gate import GOOD, POLICY, POOR, bits, three
from trans_peft.domain.evaluation import Verdict
from trans_peft.validation.gate import judge
from trans_peft.validation.statistics.e_values import e_bh


def reference_e_bh(values, hypotheses, fdr):
    """The largest k of which the k-th largest e-value is at least K / (q k), by trying all k."""
    ordered = sorted(values.values(), reverse=True)
    sizes = [k for k in range(1, len(ordered) + 1) if ordered[k - 1] >= hypotheses / (fdr * k)]
    least = ordered[max(sizes) - 1] if sizes else float("inf")
    return {name for name, value in values.items() if value >= least}


@given(
    st.lists(st.integers(0, 400), max_size=30),
    st.integers(0, 20),
    st.sampled_from([0.05, 0.1, 0.5]),
)
def test_e_bh_equals_its_definition(values, without, fdr):
    named = {f"a{i}": float(value) for i, value in enumerate(values)}
    hypotheses = len(values) + without
    found = e_bh(named, hypotheses, fdr)
    assert found == reference_e_bh(named, hypotheses, fdr)


def test_adapters_that_all_passed_are_selected_together_or_not_at_all():
    values = {f"a{i}": 20.0 for i in range(50)}
    assert e_bh(values, 100, 0.1) == set(values)
    assert e_bh(values, 101, 0.1) == frozenset()
    assert e_bh({}, 0, 0.1) == frozenset()


def judged(reference, candidate, bare, policy=EARLY):
    arms = three(reference, candidate, bare)
    _, evaluated, bare_part = drive(policy, *arms)
    return judge(policy, arms[0], evaluated, bare_part)


def test_a_passed_verdict_has_the_e_value_of_its_level():
    judgment = judged(GOOD, bits(258, 42), POOR)
    assert (judgment.verdict, judgment.e_value) == (Verdict.PASSED, pytest.approx(20))
    strict = replace(EARLY, alpha=0.01)
    assert judged([1] * 300, [1] * 300, POOR, strict).e_value == pytest.approx(100)


def test_other_verdicts_have_less_evidence():
    assert judged(GOOD, bits(200, 100), POOR).e_value < 1
    assert 0 <= judged([1] * 30, [1] * 30, [0] * 30).e_value < 20


def test_a_fixed_size_verdict_has_no_e_value():
    assert judge(POLICY, *three(GOOD, bits(258, 42), POOR)).e_value is None


PAGE = (Path(__file__).parents[3] / "docs" / "statistics.md").read_text()
TABLE = [
    [float(number) for number in re.findall(r"[\d.]+", line)]
    for line in PAGE.split("<!-- fleet:")[1].split("\n\n")[1].splitlines()[2:]
]


def test_the_table_in_the_docs_keeps_the_target():
    assert len(TABLE) == 6
    assert all(row[5] <= 10 and row[4] <= row[2] for row in TABLE)
    assert max(row[3] for row in TABLE) > 10


def test_dependent_fleets_keep_the_false_discovery_rate():
    """The figures of docs/statistics.md for smaller fleets: the target is 10 %."""
    mostly_bad = simulate(0.9, 0.05, fleets=6, adapters=300, seed=9)
    assert mostly_bad.false > 0.1  # without a target
    assert mostly_bad.false_selected <= 0.1
    mostly_good = simulate(0.1, 0.05, fleets=4, adapters=300, seed=9)
    assert 0.3 < mostly_good.selected <= mostly_good.passed
    assert mostly_good.false_selected < 0.1
