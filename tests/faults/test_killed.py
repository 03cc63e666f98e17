"""`kill -9` of each program in the middle of upgrades: each ends as one that nobody disturbed.

For each victim `--moments` moments are drawn (by a seed, uniformly) from the length of an
undisturbed upgrade, several for each upgrade (A_TIME). At each moment all processes of the program
get SIGKILL, its children too, for the worker also the flow runs; the process manager starts it
again. "flow" is one flow run at work, whichever; where none is, the next. Until the program answers
again the clock stands still by which the moments are counted. Where an upgrade ends before its last
moment, that one comes right after the end.

What was lost is brought back by hints, by the reconciles under way, or at the latest by the
schedule. That would be ten minutes: where nothing at all has been under way for LULL_S, the test
starts what the schedule would start, and counts it.
"""

import random
import time
from contextlib import suppress

import psutil
import pytest

from infra.stack.health import healthy
from infra.stack.machine import marked
from infra.stack.supervisor import Supervisor
from tests.faults.upgrade import (
    PATIENCE_S,
    Upgrade,
    at_work,
    final_state,
    forget,
    insist,
    make_family,
    promotions,
)
from tests.stories.place import wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(4 * 3600)]

A_TIME = {"worker": 2, "flow": 2, "bridge": 4, "prefect": 2, "mlflow": 4, "s3": 4}
"""So many kills in one upgrade, by victim. At the third death of the process that judges it an
adapter is parked for a person, as it should be; where the other three die, no process has to."""
LULL_S = 20


@pytest.mark.parametrize("victim", A_TIME)
def test_whoever_is_killed_the_registry_ends_as_if_nothing_had_been(
    victim, stack, undisturbed, moments, told, tmp_path
):
    took_s, expected = undisturbed
    draw = random.Random(f"kill the {victim}")
    ends = {}
    for first in range(0, moments, A_TIME[victim]):
        family = make_family(stack, victim, tmp_path)
        count = min(A_TIME[victim], moments - first)
        drawn = sorted(draw.uniform(0, took_s) for _ in range(count))
        trial = Trial(Upgrade(family).begin(), victim, draw)
        try:
            for moment_s in drawn:
                trial.kill_at(moment_s)
            trial.see_through()
        finally:
            for kill in trial.kills:
                told(
                    victim=victim,
                    family=family.name,
                    undisturbed_s=round(took_s, 1),
                    scheduled=trial.scheduled,
                    **kill,
                )
        ends[family.name] = final_state(family)
        assert promotions(family).count("v2") <= 1
        forget(family)
    assert ends == dict.fromkeys(ends, expected)


class Trial:
    """One upgrade that is disturbed, and watched as the schedule would watch it."""

    def __init__(self, upgrade, victim, draw):
        self.upgrade = upgrade
        self.stack = upgrade.family.stack
        self.victim = victim
        self.draw = draw
        self.kills = []
        self.away_s = 0.0
        self.runs = {}
        self.quiet_since = None
        self.scheduled = 0

    def kill_at(self, moment_s):
        """Kill the victim when the clock shows `moment_s`, and wait until it is back."""
        while (left_s := moment_s + self.away_s - self.upgrade.seconds) > 0:
            self.look()
            if self.upgrade.over() and not self.runs:
                break
            time.sleep(min(0.5, left_s))
        began = time.monotonic()
        kill = {"moment_s": round(moment_s, 1), "seconds": self.upgrade.seconds}
        if self.victim == "flow":
            kill["killed"] = self.kill_flow()
        else:
            self.kill_program()
        kill["at_work"] = sorted(f"{run['flow']} {run['state_name']}" for run in self.runs.values())
        kill["away_s"] = round(time.monotonic() - began, 1)
        self.away_s += time.monotonic() - began
        self.kills.append(kill)

    def kill_program(self):
        """Kill the program, which is up, and wait until it is up again."""
        settings = self.stack.settings
        pid = Supervisor(settings).pid(self.victim)
        everyone = marked(settings.state, self.victim)
        for process in sorted(everyone, key=lambda process: process.pid != pid):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        wait_until(lambda: self.is_back(pid), PATIENCE_S)

    def is_back(self, old_pid):
        """Whether another process has become the program, and answers."""
        settings = self.stack.settings
        pid = Supervisor(settings).pid(self.victim)
        became = pid != old_pid and pid in {p.pid for p in marked(settings.state, self.victim)}
        return became and healthy(self.victim, settings)

    def kill_flow(self):
        """Kill one flow run at work, as soon as there is one, and return whose it was."""
        while not (found := self.flow_processes()) and not self.upgrade.over():
            self.look()
            time.sleep(0.1)
        if not found:
            return None
        run_id = self.draw.choice(sorted(found))
        for process in found[run_id]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return self.runs.get(run_id, {"flow": "just started"})["flow"]

    def flow_processes(self):
        """Return the processes of flow runs, by the run's id."""
        found = {}
        for process in marked(self.stack.settings.state, "worker"):
            with suppress(psutil.NoSuchProcess):
                if run_id := process.environ().get("PREFECT__FLOW_RUN_ID"):
                    found.setdefault(run_id, []).append(process)
        return found

    def see_through(self):
        """Wait until the fleet serves on v2 and nothing is under way."""
        self.look()
        deadline = time.monotonic() + PATIENCE_S
        while not self.upgrade.over() or self.runs:
            assert time.monotonic() < deadline, (self.kills, self.runs)
            self.look()
            time.sleep(0.5)
        for kill in self.kills:
            kill["seconds_to_end"] = round(self.upgrade.seconds - kill.pop("seconds"), 1)

    def look(self):
        """See what is under way; if nothing is for a while, do what the schedule would do."""
        self.runs = at_work(self.stack)
        if self.runs or self.upgrade.over():
            self.quiet_since = None
        elif self.quiet_since is None:
            self.quiet_since = time.monotonic()
        elif time.monotonic() - self.quiet_since > LULL_S:
            self.scheduled += 1
            insist(self.stack.start, "reconcile")
            self.quiet_since = None
