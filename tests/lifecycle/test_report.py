"""The report of a fleet with more adapters than it shows."""

from dataclasses import replace

import pytest

from tests.lifecycle.fleet import FAMILY, MemoryFleet, evaluation
from trans_peft.domain.evaluation import Verdict
from trans_peft.lifecycle import report as module
from trans_peft.lifecycle.report import report


class CountingEvaluations:
    def __init__(self, port):
        self.port, self.reads = port, 0

    def summary(self, key):
        self.reads += 1
        return self.port.summary(key)


@pytest.fixture
def fleet(tmp_path):
    """Five adapters. The fourth does not serve on v2, which is champion."""
    found = MemoryFleet(tmp_path)
    v1 = found.add_base("v1")
    for name in "abcde":
        version = found.add_adapter(name, v1)
        found.platform.evaluations.put(evaluation(version.weights_sha256, v1, 9, 10))
    v2 = found.add_base("v2")
    found.promote(v2)
    for task in found.tasks():
        found.judge(task, Verdict.INCONCLUSIVE if task.adapter == "d" else Verdict.PASSED)
    found.apply_verdicts()
    return found


def test_a_large_fleet_is_cut_after_the_adapters_that_do_not_serve(fleet, monkeypatch):
    monkeypatch.setattr(module, "MAX_ADAPTERS", 2)
    counting = CountingEvaluations(fleet.platform.evaluations)
    found = report(FAMILY, replace(fleet.platform, evaluations=counting))
    assert counting.reads == 2
    assert list(dict.fromkeys(row.adapter for row in found.rows)) == [*"dabce"]
    lines = found.markdown().splitlines()
    assert lines[4] == (
        "5 live adapters. Serving: 5 on v1, 4 on v2. The first 2 are shown, those that do "
        "not serve on v2 before others."
    )
    assert [line[:4] for line in lines if line.startswith("| ")] == ["| ad", "| d ", "| a "]
    assert [line.split("**")[1] for line in lines if line.startswith("- **")] == ["d", "a"]


def test_a_small_fleet_is_shown_in_full(fleet):
    found = report(FAMILY, fleet.platform)
    assert list(dict.fromkeys(row.adapter for row in found.rows)) == [*"abcde"]
    lines = found.markdown().splitlines()
    assert [line[2] for line in lines if line.startswith("| ")] == [*"aabcde"]
    assert not any("live adapters" in line for line in lines)


def test_long_lists_end_with_the_number_of_others(fleet, monkeypatch):
    monkeypatch.setattr(module, "MAX_ADAPTERS", 3)
    found = replace(report(FAMILY, fleet.platform), unreadable=tuple("vwxyz"))
    assert found.markdown().endswith("- v\n- w\n- x\n- and 2 more")
