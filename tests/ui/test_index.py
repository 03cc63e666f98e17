"""Rows, selection and progress, against the report, the plan and a plain reference."""

from dataclasses import replace
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ui.fleets import FAMILY, POLICY, large
from trans_peft.domain.evaluation import Verdict
from trans_peft.domain.fleet import Fleet
from trans_peft.errors import NotFoundError
from trans_peft.lifecycle.reconcile import observe, plan
from trans_peft.lifecycle.report import report
from trans_peft.ui.index import (
    Cell,
    FleetIndex,
    FleetQuery,
    Override,
    Row,
    Sort,
    State,
    build_index,
    select,
)
from trans_peft.ui.progress import progress_of


@pytest.fixture(scope="module")
def observed(fleet):
    return observe(FAMILY, fleet.platform)


def test_the_cells_say_what_the_fleet_report_says(fleet, observed):
    cells = {
        (row.adapter, cell.base): cell for row in build_index(observed).rows for cell in row.cells
    }
    rows = report(FAMILY, fleet.platform).rows
    assert len(rows) == len(cells)
    for row in rows:
        cell = cells[row.adapter, row.base]
        if row.verdict is None:
            assert cell.state is (State.MISSING if row.reason == "no verdict" else State.TRAINED)
        else:
            assert cell.state.value == row.verdict.value
            differences = [suite.versus_old_base.difference for suite in row.suites]
            assert cell.difference == (min(differences) if differences else None)
        assert cell.serves == row.serves
        assert bool(cell.override) == bool(row.manual)


def test_filters_refer_to_champion_or_else_to_the_newest_base_version(observed):
    numbers = {base.version: base.number for base in observed.bases}
    for champion, expected in (("v3", "v3"), ("v1", "v1"), (None, "v3")):
        fleet = replace(observed, champion=numbers.get(champion), serving=numbers["v2"])
        assert select(build_index(fleet), FleetQuery()).base == expected
    not_ready = replace(observed, champion=99)
    assert select(build_index(not_ready), FleetQuery()).base == "v3"


def test_the_progress_says_what_the_plan_says(observed):
    found = progress_of(build_index(observed))
    planned = plan(observed, POLICY)
    assert found.missing == len(planned.tasks)
    for base in found.bases:
        tasks = [task for task in planned.tasks if task.base.version == base.base]
        assert base.missing + base.retried == (len(tasks) if base.is_desired else 0)
        assert base.parked == sum(task.base.version == base.base for task in planned.parked)


def test_a_transfer_that_failed_three_times_is_parked(tmp_path, fleet, observed):
    adapter = observed.adapter("tests-pytest")
    failed = tuple(
        replace(outcome, attempts=3) if outcome.verdict is Verdict.FAILED else outcome
        for outcome in adapter.outcomes
    )
    others = tuple(a for a in observed.adapters if a.name != adapter.name)
    changed = replace(observed, adapters=(*others, replace(adapter, outcomes=failed)))
    base = progress_of(build_index(changed)).bases[0]
    assert (base.retried, base.parked) == (0, 1) == (0, len(plan(changed, POLICY).parked))
    assert base.share == 9 / 12


def test_the_time_left_is_that_of_the_missing_transfers(observed):
    base = progress_of(build_index(observed)).bases[0]
    seconds = [
        o.seconds
        for a in observed.adapters
        for o in a.outcomes
        if o.base.version == "v3" and o.seconds
    ]
    assert base.seconds_each == pytest.approx(sum(seconds) / len(seconds))
    assert base.seconds_left == pytest.approx(base.seconds_each * (base.missing + base.retried))


def test_without_adapters_nothing_is_missing():
    empty = progress_of(build_index(Fleet("none", (), None, None, ())))
    assert (empty.missing, empty.seconds_left, empty.bases) == (0, 0, ())


# Selection.

names = st.text("abAB-1", min_size=1, max_size=4)
cells = st.builds(
    Cell,
    base=st.just("v1"),
    state=st.sampled_from(State),
    serves=st.booleans(),
    override=st.just(Override.NONE),
    difference=st.none() | st.floats(-50, 50),
    strategy=st.just(""),
)


@st.composite
def indexes(draw, observed_bases):
    rows = [
        Row(
            name,
            draw(st.sampled_from(["", "us", "them"])),
            draw(st.sampled_from(["LORA", "LOHA"])),
            tuple(draw(st.sets(st.sampled_from(["a", "b"])))),
            "v1",
            tuple(replace(draw(cells), base=base.version) for base in observed_bases),
        )
        for name in sorted(draw(st.sets(names, max_size=25)), key=lambda n: (n.lower(), n))
    ]
    return FleetIndex(Fleet(FAMILY, observed_bases, 1, 2, ()), tuple(rows))


queries = st.builds(
    FleetQuery,
    q=st.sampled_from(["", "a", "B", "-1"]),
    base=st.sampled_from(["", "v1", "v3"]),
    verdict=st.sampled_from([None, *State]),
    method=st.sampled_from(["", "LORA", "NONE"]),
    suite=st.sampled_from(["", "a"]),
    owner=st.sampled_from(["", "us"]),
    serves=st.booleans(),
    sort=st.sampled_from(Sort),
    descending=st.booleans(),
    page=st.integers(1, 9),
    size=st.integers(1, 9),
)
ORDER = [
    "failed",
    "needs-retuning",
    "incompatible",
    "retire",
    "inconclusive",
    "missing",
    "passed",
    "trained",
]


def expected(index, query):
    """Select with plain loops, one condition after another."""
    base = query.base or "v2"  # champion
    column = [b.version for b in index.fleet.bases].index(base)
    rows = list(index.rows)
    rows = [r for r in rows if query.q.upper() in r.adapter.upper()]
    rows = [r for r in rows if query.verdict in (None, r.cells[column].state)]
    rows = [r for r in rows if query.method in ("", r.method)]
    rows = [r for r in rows if not query.suite or query.suite in r.suites]
    rows = [r for r in rows if query.owner in ("", r.owner)]
    rows = [r for r in rows if not query.serves or r.cells[column].serves]
    if query.sort == "name":
        rows.sort(key=lambda r: (r.adapter.lower(), r.adapter), reverse=query.descending)
        return rows
    sign = -1 if query.descending else 1
    if query.sort == "difference":
        lost = [r.cells[column].difference for r in rows]
        keys = [(d is None, sign * d if d is not None else 0) for d in lost]
    elif query.sort == "verdict":
        keys = [(sign * ORDER.index(r.cells[column].state),) for r in rows]
    else:
        keys = [(sign * ["LOHA", "LORA"].index(r.method),) for r in rows]
    return [rows[i] for i in sorted(range(len(rows)), key=lambda i: (keys[i], i))]


@given(data=st.data(), query=queries)
def test_selection_equals_a_plain_one(observed, data, query):
    index = data.draw(indexes(observed.bases))
    rows = expected(index, query)
    page = select(index, query)
    pages = max(1, ceil(len(rows) / query.size))
    shown = min(query.page, pages)
    assert (page.found, page.total, page.pages, page.page) == (
        len(rows),
        len(index.rows),
        pages,
        shown,
    )
    assert list(page.rows) == rows[(shown - 1) * query.size : shown * query.size]


@given(data=st.data(), query=queries)
def test_the_pages_together_have_every_row_once(observed, data, query):
    index = data.draw(indexes(observed.bases))
    first = select(index, query)
    rows = [
        row
        for number in range(1, first.pages + 1)
        for row in select(index, query.model_copy(update={"page": number})).rows
    ]
    assert len(rows) == first.found == len({row.adapter for row in rows})


def test_an_unknown_base_version_is_an_error(observed):
    with pytest.raises(NotFoundError, match="v9"):
        select(build_index(observed), FleetQuery(base="v9"))


def test_a_family_without_base_versions_can_be_selected():
    index = build_index(Fleet("none", (), None, None, ()))
    assert select(index, FleetQuery(sort=Sort.VERDICT)).rows == ()


def test_the_figures_of_a_larger_fleet(tmp_path):
    index = build_index(observe(FAMILY, large(tmp_path, 60)))
    assert select(index, FleetQuery(verdict=State.MISSING)).found == 12
    assert index.counts["v3"].total() == 60
    assert index.serving_counts["v3"] == index.counts["v3"][State.PASSED]
