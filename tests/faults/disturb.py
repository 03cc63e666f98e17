"""What goes wrong around an upgrade without anybody being killed: servers away, workers of our own.

The schedule comes every ten minutes; a test that waits for it starts the very run that it starts.
"""

import os
import subprocess
import time
from contextlib import contextmanager, suppress

from infra.stack.health import healthy
from infra.stack.machine import MARK, PROGRAM_MARK, end, marked
from infra.stack.programs import PROGRAMS
from infra.stack.settings import without_services
from infra.stack.supervisor import Supervisor
from tests.faults.upgrade import PATIENCE_S, at_work, final_state, forget, insist
from tests.stories.place import wait_until

LULL_S = 20
"""Where nothing at all was under way for so long, the next to come is the schedule."""


def schedule(stack):
    """Start the run that the schedule starts."""
    return insist(stack.start, "reconcile")


def see_through(upgrade, patience_s=PATIENCE_S):
    """Wait until the upgrade is over and nothing is under way; return how often it was scheduled.

    The schedule comes where nobody is at work any more.
    """
    stack = upgrade.family.stack
    deadline, quiet_since, scheduled = time.monotonic() + patience_s, time.monotonic(), 0
    while not upgrade.over() or at_work(stack):
        assert time.monotonic() < deadline, at_work(stack)
        if at_work(stack):
            quiet_since = time.monotonic()
        elif time.monotonic() - quiet_since > LULL_S:
            schedule(stack)
            scheduled, quiet_since = scheduled + 1, time.monotonic()
        time.sleep(0.5)
    return scheduled


def judging(stack, family):
    """Whether a shard of the family is at work."""
    return any(
        run["state_type"] == "RUNNING" and run["parameters"].get("family") == family.name
        for run in at_work(stack).values()
        if "shard" in run["parameters"]
    )


def ends_as(undisturbed, family):
    """Assert that the family ended as an undisturbed one, and remove it."""
    assert final_state(family) == undisturbed.after(2)
    forget(family)


@contextmanager
def stopped(stack, program):
    """Have a program of the stack stopped, so that its port refuses; then started and healthy."""
    manager = Supervisor(stack.settings)
    manager.stop_program(program)
    wait_until(lambda: not manager.pid(program))
    try:
        yield
    finally:
        manager.start_program(program)
        wait_until(lambda: healthy(program, stack.settings), 300)


@contextmanager
def worker(stack, name, folder, **environment):
    """Have a worker of one's own at work, as on another machine: its folder, its environment."""
    settings = stack.settings
    folder.mkdir(parents=True, exist_ok=True)
    program = PROGRAMS["worker"]
    command = [name if word == "local" else word for word in program.command(settings)]
    ours = {
        **without_services(os.environ),
        **program.environment(settings),
        "TRANS_PEFT_STATE": str(folder / "work"),
        MARK: str(settings.state),
        PROGRAM_MARK: name,
        **environment,
    }
    with (folder / "worker.log").open("w") as log:
        running = subprocess.Popen(command, env=ours, cwd=folder, stdout=log, stderr=log)
    try:
        yield running
    finally:
        running.terminate()
        with suppress(subprocess.TimeoutExpired):  # then, as the process manager does, by force
            running.wait(program.stop_s)
        end(marked(settings.state, name), grace_s=10)
