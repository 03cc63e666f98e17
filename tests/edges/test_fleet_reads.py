"""`fleet` while the registry changes between its two searches and between their pages."""

import copy
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.edges.fake_tracking import FakeTracking
from tests.edges.one_by_one import one_by_one
from tests.edges.test_odd_registry import Two
from tests.lifecycle.fleet import ANY, POLICY
from trans_peft.domain.evaluation import Verdict
from trans_peft.edges.mlflow_client import _MAX_FILTER, _names_filters, tag
from trans_peft.edges.mlflow_registry import MlflowRegistry
from trans_peft.lifecycle.apply_verdicts import apply_verdicts
from trans_peft.lifecycle.reconcile import observe


class Overtaken:
    """A registry whose two searches return the state before a change, or after it."""

    def __init__(self, before: FakeTracking, after: FakeTracking, first: str) -> None:
        self.models = (before if first == "models" else after).models
        self.tagged_versions = (before if first == "versions" else after).tagged_versions
        self._after = after

    def __getattr__(self, name: str):  # single reads come after both searches
        return getattr(self._after, name)


def base(two, number):
    return two.spoilt.platform.catalog.versions("spoilt")[number - 1]


def register_an_adapter(two):
    two.spoilt.add_adapter("fresh", base(two, 1))


def register_a_version(two):
    two.spoilt.add_adapter("bad", base(two, 2), weights="trained there")


def judge_again(two):
    two.spoilt.judge(two.spoilt.tasks()[0], Verdict.INCONCLUSIVE)
    two.spoilt.apply_verdicts()


def retire(two):
    two.tracking.tag_model("bad", "retired", "true")


def delete_an_adapter(two):
    del two.tracking.known["bad"], two.tracking.made["bad"]


def delete_a_version(two):
    del two.tracking.made["bad"][0]


def remove_the_family(two):
    two.tracking.untag_model("bad", "family")


def move_to_another_family(two):
    two.tracking.tag_model("bad", "family", "other")
    for version in two.tracking.made["bad"]:
        version.tags[tag("family")] = "other"


CHANGES = (
    *(register_an_adapter, register_a_version, retire, judge_again),
    *(delete_an_adapter, delete_a_version, remove_the_family, move_to_another_family),
)


@pytest.fixture
def two(tmp_path):
    found = Two(tmp_path)
    found.spoilt.add_base("v3")
    return found


@pytest.mark.parametrize("first", ["models", "versions"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_each_adapter_is_as_before_or_as_after_a_change_between_the_searches(two, change, first):
    registry = two.spoilt.platform.registry
    before = copy.deepcopy(two.tracking)
    change(two)
    states = {}
    for tracking in (before, two.tracking):
        registry._tracking = tracking
        for adapter in one_by_one(registry, "spoilt")[0]:
            states.setdefault(adapter.name, []).append(adapter)
    registry._tracking = Overtaken(before, two.tracking, first)
    found = observe("spoilt", two.spoilt.platform)
    assert "good" in [adapter.name for adapter in found.adapters]
    for adapter in found.adapters:  # aliases may be from another moment than verdicts
        known = [replace(state, aliases={}) for state in states[adapter.name]]
        assert replace(adapter, aliases={}) in known
        assert adapter.aliases in [state.aliases for state in states[adapter.name]]
    seen = {adapter.name for adapter in found.adapters}
    lost = {name for name, found in states.items() if len(found) == 2} - seen
    assert all(any(line.startswith(name) for line in found.unreadable) for name in lost)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_rows_that_fall_between_two_pages_are_read_again(shared, data):
    """The deletion of a row moves the rows behind it to an earlier page, which was read already."""
    registry = MlflowRegistry("fake://")
    registry._tracking = tracking = copy.deepcopy(shared)
    expected = registry.fleet("spoilt")
    models, versions = tracking.models, tracking.tagged_versions
    if data.draw(st.booleans()):
        lost = data.draw(st.sampled_from([model.name for model in models({"family": "spoilt"})]))
        tracking.models = lambda tags: [m for m in models(tags) if m.name != lost]
    else:
        at = data.draw(st.integers(0, len(versions({"family": "spoilt"})) - 1))
        tracking.tagged_versions = lambda tags: [
            version for number, version in enumerate(versions(tags)) if number != at
        ]
    assert registry.fleet("spoilt") == expected
    assert len(expected.live) == 2


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Two(tmp_path_factory.mktemp("registry")).tracking


@pytest.mark.parametrize("deleted", [False, True])
def test_the_number_of_reads_does_not_depend_on_the_number_of_adapters(two, deleted):
    fleet, reads = two.spoilt, []

    class Counting:
        def __getattr__(self, name):
            reads.append(name)
            return getattr(two.tracking, name)

    counted = []
    for count in (3, 40):
        for number in range(count):
            fleet.add_adapter(f"more-{number}", base(two, 1))
            fleet.add_adapter(f"more-{number}", base(two, 1), weights="retrained")
            if deleted:
                del two.tracking.made[f"more-{number}"][0]
        fleet.platform.registry._tracking = Counting()
        reads.clear()
        assert len(fleet.platform.registry.fleet("spoilt").live) == count + 2
        counted.append([*reads])
        fleet.platform.registry._tracking = two.tracking
    wanted = ["models", "tagged_versions", "versions_of"]
    assert [sorted(names) for names in counted] == [wanted, wanted]


@given(st.lists(st.text("ab-c.9", min_size=1, max_size=100), max_size=200))
def test_the_filters_have_each_name_once_and_a_limited_length(names):
    filters = [*_names_filters(names)]
    assert all(len(one) < _MAX_FILTER + 200 for one in filters)
    listed = [part for one in filters for part in one[len("name IN (") : -1].split(", ")]
    assert listed == [f"'{name}'" for name in names]


def test_a_verdict_that_was_overtaken_moves_no_alias(two):
    """Another run records a newer verdict and applies it, after this run read the fleet."""
    fleet, v3 = two.spoilt, base(two, 3)
    task = next(task for task in fleet.tasks() if task.adapter == "good" and task.base == v3.ref)
    fleet.judge(task, Verdict.PASSED)
    seen = observe("spoilt", fleet.platform)  # passed, but the alias is not set yet
    fleet.judge(task, Verdict.INCONCLUSIVE)
    fleet.apply_verdicts()
    assert apply_verdicts(seen, POLICY, ANY, fleet.platform)[1].aliases == ()
    assert fleet.platform.registry.alias("good", v3.alias) is None
    retired = observe("spoilt", fleet.platform)
    fleet.judge(task, Verdict.PASSED)
    two.tracking.tag_model("good", "retired", "true")
    assert apply_verdicts(retired, POLICY, ANY, fleet.platform)[1].aliases == ()
