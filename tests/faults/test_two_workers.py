"""Two workers on two families and on one, and two reconciles at once."""

import os
import subprocess
import sys

import pytest

from tests.end_to_end.running_stack import ROOT, wait_until
from tests.faults.disturb import assert_ends_as, wait_for_end, worker
from tests.faults.upgrade import PATIENCE_S, Upgrade, make_family, unfinished_runs

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2 * 3600)]


@pytest.fixture
def two_slots(stack):
    """Allow two shards at a time, as with two GPUs."""

    def set_to(slots):
        environment = {**os.environ, **stack.settings.to_environment(), "GPU_SLOTS": str(slots)}
        environment |= stack.settings.client_environment
        command = [sys.executable, "-m", "infra.stack.prefect_objects"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)

    set_to(2)
    yield
    set_to(1)


@pytest.fixture
def second(stack, two_slots, tmp_path):
    """Another worker beside the stack's own, with a folder of its own."""
    with worker(stack, "second", tmp_path / "second"):
        yield


def test_two_workers_on_two_families_and_two_reconciles_of_each(
    stack, undisturbed, second, record_fault, tmp_path
):
    families = [make_family(stack, name, tmp_path) for name in ("left", "right")]
    upgrades = [Upgrade(family).begin() for family in families]
    wait_until(lambda: all(family.version("v2") for family in families), PATIENCE_S)
    for family in families * 2:
        stack.start("reconcile", family=family.name)
    for upgrade in upgrades:
        wait_for_end(upgrade)
    record_fault(fault="two workers, two families", seconds=upgrades[0].seconds)
    for family in families:
        assert_ends_as(undisturbed, family)


def test_two_workers_and_two_reconciles_on_one_family(
    stack, undisturbed, second, record_fault, tmp_path
):
    """A shard for each adapter, so that both workers have one of the family's.

    And each shard once more, as two reconciles would start it that cannot see each other.
    """
    family = make_family(stack, "shared", tmp_path)
    stack.set_parameters_of_reconcile(shard_size=1)
    try:
        upgrade = Upgrade(family).begin()
        wait_until(lambda: family.version("v2"), PATIENCE_S)
        for _ in range(2):
            stack.start("reconcile", family=family.name)
        wait_until(lambda: shards(stack) or upgrade.over(), PATIENCE_S)
        for run in shards(stack):
            stack.start("transfer-shard", **run["parameters"])
        together = 0
        while not upgrade.over() or unfinished_runs(stack):
            running = [run for run in shards(stack) if run["state_type"] == "RUNNING"]
            together = max(together, len(running))
        wait_for_end(upgrade)
    finally:
        stack.set_parameters_of_reconcile(shard_size=16)
    record_fault(fault="two workers, one family", seconds=upgrade.seconds, shards_at_once=together)
    assert_ends_as(undisturbed, family)


def shards(stack):
    """Return the shards that are not over."""
    return [run for run in unfinished_runs(stack).values() if "shard" in run["parameters"]]
