"""A full disk of a worker is reported, nothing is partly registered, and work resumes later."""

import shutil
import subprocess
from contextlib import contextmanager

import pytest

from tests.end_to_end.running_stack import wait_until
from tests.faults.disturb import assert_ends_as, schedule, stopped, wait_for_end, worker
from tests.faults.upgrade import PATIENCE_S, Upgrade, make_family, unfinished_runs

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2 * 3600)]

LEFT_BYTES = 16 << 10
"""Enough for locks and small files, not for a model."""


@contextmanager
def small_disk(folder, size_bytes=8 << 20):
    """Mount a disk of this size. Skips the test if this user may not mount."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    """Leave LEFT_BYTES on the disk of this folder; return the file that holds the rest."""
    filler = folder / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(folder).free - LEFT_BYTES))
    return filler


def test_a_full_disk_is_reported_and_the_upgrade_ends_once_there_is_room(
    stack, undisturbed, record_fault, tmp_path
):
    family = make_family(stack, "full", tmp_path)
    with small_disk(tmp_path / "disk") as disk:
        filler = fill(disk)
        with (
            stopped(stack, "worker"),
            worker(stack, family.name, tmp_path / "worker", TRANS_PEFT_STATE=str(disk)),
        ):
            upgrade = Upgrade(family).begin()
            wait_until(lambda: family.version("v2"), PATIENCE_S)
            wait_until(lambda: is_reported(disk, family), PATIENCE_S)
            wait_until(lambda: not unfinished_runs(stack), PATIENCE_S)
            assert [len(versions(stack, name)) for name in family.adapters] == [1, 1]
            assert family.serving == "1"
            filler.unlink()
            schedule(stack)
            wait_for_end(upgrade)
    record_fault(fault="full disk", seconds=upgrade.seconds)
    assert_ends_as(undisturbed, family)


def versions(stack, name):
    return stack.mlflow.search_model_versions(f"name='{name}'")


def is_reported(disk, family):
    """Whether a reconcile failed with an error that names the disk, its needs and its space."""
    found = family.stack.prefect("POST", "flow_runs/filter", json={"limit": 200})
    messages = [run["state"]["message"] or "" for run in found if run["state_type"] == "FAILED"]
    words = (
        *(f"the disk of {disk}", "expected: ", "found: ", "do: "),
        "the next run continues its work",
    )
    return any(all(word in message for word in words) for message in messages)
