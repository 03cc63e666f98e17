"""Helpers for faults other than kills: stopped servers, additional workers, the schedule.

The schedule starts a run every ten minutes. Tests start the same run themselves instead of waiting.
"""

import os
import subprocess
import time
from contextlib import contextmanager, suppress

from infra.stack.health import is_healthy
from infra.stack.machine import MARK, PROGRAM_MARK, end, marked
from infra.stack.programs import PROGRAMS
from infra.stack.settings import without_services
from infra.stack.supervisor import Supervisor
from tests.end_to_end.running_stack import wait_until
from tests.faults.upgrade import PATIENCE_S, final_state, forget, retrying, unfinished_runs

IDLE_S = 20
"""After this time without any unfinished run, only the schedule would start another one."""


def schedule(stack):
    """Start the run that the schedule starts."""
    return retrying(stack.start, "reconcile")


def wait_for_end(upgrade, patience_s=PATIENCE_S):
    """Wait until the upgrade is complete and no run is unfinished. Return the scheduled runs.

    Starts a scheduled run whenever all runs have ended and the upgrade is not complete.
    """
    stack = upgrade.family.stack
    deadline, quiet_since, scheduled = time.monotonic() + patience_s, time.monotonic(), 0
    while not upgrade.over() or unfinished_runs(stack):
        assert time.monotonic() < deadline, unfinished_runs(stack)
        if unfinished_runs(stack):
            quiet_since = time.monotonic()
        elif time.monotonic() - quiet_since > IDLE_S:
            schedule(stack)
            scheduled, quiet_since = scheduled + 1, time.monotonic()
        time.sleep(0.5)
    return scheduled


def judging(stack, family):
    """Whether a shard of the family is running."""
    return any(
        run["state_type"] == "RUNNING" and run["parameters"].get("family") == family.name
        for run in unfinished_runs(stack).values()
        if "shard" in run["parameters"]
    )


def assert_ends_as(undisturbed, family):
    """Assert that the family ended as the undisturbed one, and delete it."""
    assert final_state(family) == undisturbed.after(2)
    forget(family)


@contextmanager
def stopped(stack, program):
    """Stop a program of the stack, so that its port refuses connections, and start it again."""
    manager = Supervisor(stack.settings)
    manager.stop_program(program)
    wait_until(lambda: not manager.pid(program))
    try:
        yield
    finally:
        manager.start_program(program)
        wait_until(lambda: is_healthy(program, stack.settings), 300)


@contextmanager
def worker(stack, name, folder, *, command=(), options=(), **environment):
    """Run an additional worker with its own folder and environment, as on another machine.

    `command` precedes the worker's own command line, and `options` follow it.
    """
    settings = stack.settings
    folder.mkdir(parents=True, exist_ok=True)
    program = PROGRAMS["worker"]
    own = [name if word == "local" else word for word in program.command(settings)]
    ours = {
        **without_services(os.environ),
        **program.environment(settings),
        "TRANS_PEFT_STATE": str(folder / "work"),
        MARK: str(settings.state),
        PROGRAM_MARK: name,
        **environment,
    }
    with (folder / f"{name}.log").open("w") as log:
        running = subprocess.Popen(
            [*command, *own, *options], env=ours, cwd=folder, stdout=log, stderr=log
        )
    try:
        yield running
    finally:
        running.terminate()
        with suppress(subprocess.TimeoutExpired):  # it is killed below
            running.wait(program.stop_s)
        end(marked(settings.state, name), grace_s=10)
