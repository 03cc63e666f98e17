"""SIGKILL of each program during upgrades: every upgrade ends as one without kills.

For each of PROGRAMS, a seed draws `--moments` moments uniformly from the duration of an undisturbed
upgrade, UPGRADE_MOMENTS for each upgrade of its family. At each moment all processes of the program
get SIGKILL: its children too and, for the worker, the flow runs. The process manager restarts the
program. "flow" is any running flow run, or the next one if none runs. "shard" is a run that
evaluates, some seconds after it was seen, so that it is killed later as often as in its imports.
The time until the program answers again does not count. If an upgrade ends before its last moment,
the kill follows directly after the end.

The third death of the process that evaluates an adapter parks the adapter, as designed. A moment
that would cause the third death in one upgrade is left for the next upgrade.

Notifications, running reconciles and the schedule repeat the lost work. The schedule runs every ten
minutes. If no run is unfinished for IDLE_S, the test starts what the schedule would start, and
counts it.
"""

import random
import time
from contextlib import suppress
from itertools import count

import psutil
import pytest

from infra.stack.health import is_healthy
from infra.stack.machine import marked
from infra.stack.supervisor import Supervisor
from tests.end_to_end.running_stack import wait_until
from tests.faults.upgrade import (
    PATIENCE_S,
    Upgrade,
    final_state,
    forget,
    make_family,
    promotions,
    retrying,
    unfinished_runs,
)
from trans_peft.lifecycle.reconcile import MAX_ATTEMPTS

pytestmark = [pytest.mark.faults, pytest.mark.timeout(4 * 3600)]

PROGRAMS = ("worker", "flow", "shard", "bridge", "prefect", "mlflow", "s3")
JUDGE = "transfer-shard"
JUDGES = ("worker", "prefect")
"""Killing these may end a shard too: it retries Prefect for about a minute."""
UPGRADE_MOMENTS = 5
MAX_DEATHS = MAX_ATTEMPTS - 1
IDLE_S = 20
SHARD_S = 15
"""About the duration of a shard's process in an undisturbed upgrade."""


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_registry_ends_as_without_the_kills(
    program, stack, undisturbed, moments, record_fault, tmp_path
):
    draw = random.Random(f"kill the {program}")
    family = make_family(stack, program, tmp_path)
    left = [draw.uniform(0, undisturbed.took_s) for _ in range(moments)]
    for number in count(2):
        label, drawn, left = f"v{number}", sorted(left[:UPGRADE_MOMENTS]), left[UPGRADE_MOMENTS:]
        trial = Trial(Upgrade(family, label).begin(), program, draw)
        about = {"program": program, "family": family.name, "upgrade": label}
        try:
            left += [moment_s for moment_s in drawn if not trial.kill_at(moment_s)]
            trial.wait_for_end()
        finally:
            for kill in trial.kills:
                record_fault(**about, undisturbed_s=round(undisturbed.took_s, 1), **kill)
        assert final_state(family) == undisturbed.after(number)
        record_fault(
            **about,
            kills=len(trial.kills),
            scheduled=trial.scheduled,
            events=promotions(family).count(label),
            seconds=round(trial.upgrade.seconds),
            end="as undisturbed",
        )
        if not left:
            break
    forget(family)


class Trial:
    """One upgrade with kills. Replaces the schedule when all runs have ended."""

    def __init__(self, upgrade, program, draw):
        self.upgrade = upgrade
        self.stack = upgrade.family.stack
        self.program = program
        self.draw = draw
        self.kills = []
        self.deaths = 0
        self.away_s = 0.0
        self.runs = {}
        self.quiet_since = None
        self.scheduled = 0

    def kill_at(self, moment_s):
        """Kill the program at `moment_s` of the upgrade, and wait until it runs again.

        Return whether it was killed. It is not killed if that would park an adapter, or if it is a
        flow run and none runs any more.
        """
        while (left_s := moment_s + self.away_s - self.upgrade.seconds) > 0:
            self.poll()
            if self.upgrade.over() and not self.runs:
                break
            time.sleep(min(0.5, left_s))
        self.poll()
        began = time.monotonic()
        kill = {"moment_s": round(moment_s, 1), "seconds": self.upgrade.seconds}
        unfinished_runs = sorted(f"{run['flow']} {run['state_name']}" for run in self.runs.values())
        killed = self.kill_flow() if self.program in ("flow", "shard") else self.kill_program()
        if killed:
            away_s = time.monotonic() - began
            self.away_s += away_s
            self.kills.append(
                kill | {"killed": killed, "at_work": unfinished_runs, "away_s": round(away_s, 1)}
            )
        return bool(killed)

    def kill_program(self):
        """Kill the program, wait until it is healthy again, and return its name."""
        judged = self.program in JUDGES and JUDGE in {run["flow"] for run in self.runs.values()}
        if judged and self.deaths == MAX_DEATHS:
            return None
        self.deaths += judged
        settings = self.stack.settings
        pid = Supervisor(settings).pid(self.program)
        processes = marked(settings.state, self.program)
        for process in sorted(processes, key=lambda process: process.pid != pid):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        wait_until(lambda: self.is_back(pid), PATIENCE_S)
        return self.program

    def is_back(self, old_pid):
        """Whether a new process runs the program and is healthy."""
        settings = self.stack.settings
        pid = Supervisor(settings).pid(self.program)
        became = pid != old_pid and pid in {p.pid for p in marked(settings.state, self.program)}
        return became and is_healthy(self.program, settings)

    def kill_flow(self):
        """Kill a running flow run, as soon as there is one, and return the name of its flow."""
        while not (found := self.flow_processes()) and not self.upgrade.over():
            self.poll()
            time.sleep(0.1)
        if found and self.program == "shard":
            time.sleep(self.draw.uniform(0, SHARD_S))
            self.poll()
            found = self.flow_processes()
        if not found:
            return None
        run_id = self.draw.choice(sorted(found))
        flow = self.flow_of(run_id)
        self.deaths += flow != "reconcile"
        for process in found[run_id]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return flow

    def flow_processes(self):
        """Return the processes of the flow runs that may be killed, by the run's id."""
        found = {}
        for process in marked(self.stack.settings.state, "worker"):
            with suppress(psutil.NoSuchProcess):
                if run_id := process.environ().get("PREFECT__FLOW_RUN_ID"):
                    found.setdefault(run_id, []).append(process)
        wanted = {JUDGE} if self.program == "shard" else {JUDGE, "reconcile"}
        if self.deaths == MAX_DEATHS:
            wanted.discard(JUDGE)
        return {run_id: its for run_id, its in found.items() if self.flow_of(run_id) in wanted}

    def flow_of(self, run_id):
        return self.runs.get(run_id, {"flow": "just started"})["flow"]

    def wait_for_end(self):
        """Wait until the fleet serves on the new base and no run is unfinished."""
        self.poll()
        deadline = time.monotonic() + PATIENCE_S
        while not self.upgrade.over() or self.runs:
            assert time.monotonic() < deadline, (self.kills, self.runs)
            self.poll()
            time.sleep(0.5)
        for kill in self.kills:
            kill["seconds_to_end"] = round(self.upgrade.seconds - kill.pop("seconds"), 1)

    def poll(self):
        """Update the unfinished runs. Start a scheduled run if there is none for a while."""
        self.runs = unfinished_runs(self.stack)
        if self.runs or self.upgrade.over():
            self.quiet_since = None
        elif self.quiet_since is None:
            self.quiet_since = time.monotonic()
        elif time.monotonic() - self.quiet_since > IDLE_S:
            self.scheduled += 1
            retrying(self.stack.start, "reconcile")
            self.quiet_since = None
