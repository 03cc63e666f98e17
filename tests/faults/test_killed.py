"""`kill -9` of each program in the middle of upgrades: each ends as one that nobody disturbed.

For each victim `--moments` moments are drawn (by a seed, uniformly) from the length of an
undisturbed upgrade, A_TIME for each upgrade of its family. At each moment all processes of the
program get SIGKILL, its children too, for the worker also the flow runs; the process manager starts
it again. "flow" is one flow run at work, whichever; where none is, the next. "shard" is one that
judges, some seconds after it was seen, so that it dies in its work as often as in its imports.
Until the program answers again the clock stands still by which the moments are counted. Where an
upgrade ends before its last moment, that one comes right after the end.

At the third death of the process that judges it an adapter is parked for a person, as it should be:
a moment that would be the third of an upgrade is left for the next one.

What was lost is brought back by hints, by the reconciles under way, or at the latest by the
schedule. That would be ten minutes: where nothing at all has been under way for LULL_S, the test
starts what the schedule would start, and counts it.
"""

import random
import time
from contextlib import suppress
from itertools import count

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
from trans_peft.lifecycle.reconcile import MAX_ATTEMPTS

pytestmark = [pytest.mark.faults, pytest.mark.timeout(4 * 3600)]

VICTIMS = ("worker", "flow", "shard", "bridge", "prefect", "mlflow", "s3")
JUDGE = "transfer-shard"
JUDGES = ("worker", "prefect")
"""With them a judge dies, or may: it asks for Prefect no longer than a minute or so."""
A_TIME = 5
MAX_DEATHS = MAX_ATTEMPTS - 1
LULL_S = 20
SHARD_S = 15
"""About as long as a shard's process lives in an undisturbed upgrade."""


@pytest.mark.parametrize("victim", VICTIMS)
def test_whoever_is_killed_the_registry_ends_as_if_nothing_had_been(
    victim, stack, undisturbed, moments, told, tmp_path
):
    draw = random.Random(f"kill the {victim}")
    family = make_family(stack, victim, tmp_path)
    left = [draw.uniform(0, undisturbed.took_s) for _ in range(moments)]
    for number in count(2):
        label, drawn, left = f"v{number}", sorted(left[:A_TIME]), left[A_TIME:]
        trial = Trial(Upgrade(family, label).begin(), victim, draw)
        about = {"victim": victim, "family": family.name, "upgrade": label}
        try:
            left += [moment_s for moment_s in drawn if not trial.kill_at(moment_s)]
            trial.see_through()
        finally:
            for kill in trial.kills:
                told(**about, undisturbed_s=round(undisturbed.took_s, 1), **kill)
        assert final_state(family) == undisturbed.after(number)
        told(
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
    """One upgrade that is disturbed, and watched as the schedule would watch it."""

    def __init__(self, upgrade, victim, draw):
        self.upgrade = upgrade
        self.stack = upgrade.family.stack
        self.victim = victim
        self.draw = draw
        self.kills = []
        self.deaths = 0
        self.away_s = 0.0
        self.runs = {}
        self.quiet_since = None
        self.scheduled = 0

    def kill_at(self, moment_s):
        """Kill the victim when the clock shows `moment_s`, and wait until it is back.

        Return whether it was killed: not where an adapter would be parked for it, and no flow run
        where none is at work any more.
        """
        while (left_s := moment_s + self.away_s - self.upgrade.seconds) > 0:
            self.look()
            if self.upgrade.over() and not self.runs:
                break
            time.sleep(min(0.5, left_s))
        self.look()
        began = time.monotonic()
        kill = {"moment_s": round(moment_s, 1), "seconds": self.upgrade.seconds}
        at_work = sorted(f"{run['flow']} {run['state_name']}" for run in self.runs.values())
        killed = self.kill_flow() if self.victim in ("flow", "shard") else self.kill_program()
        if killed:
            away_s = time.monotonic() - began
            self.away_s += away_s
            self.kills.append(
                kill | {"killed": killed, "at_work": at_work, "away_s": round(away_s, 1)}
            )
        return bool(killed)

    def kill_program(self):
        """Kill the program, which is up, wait until it is up again, and return its name."""
        judged = self.victim in JUDGES and JUDGE in {run["flow"] for run in self.runs.values()}
        if judged and self.deaths == MAX_DEATHS:
            return None
        self.deaths += judged
        settings = self.stack.settings
        pid = Supervisor(settings).pid(self.victim)
        everyone = marked(settings.state, self.victim)
        for process in sorted(everyone, key=lambda process: process.pid != pid):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        wait_until(lambda: self.is_back(pid), PATIENCE_S)
        return self.victim

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
        if found and self.victim == "shard":
            time.sleep(self.draw.uniform(0, SHARD_S))
            self.look()
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
        wanted = {JUDGE} if self.victim == "shard" else {JUDGE, "reconcile"}
        if self.deaths == MAX_DEATHS:
            wanted.discard(JUDGE)
        return {run_id: its for run_id, its in found.items() if self.flow_of(run_id) in wanted}

    def flow_of(self, run_id):
        return self.runs.get(run_id, {"flow": "just started"})["flow"]

    def see_through(self):
        """Wait until the fleet serves on the new base and nothing is under way."""
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
