"""The reconcile flow on a fleet in memory, with a list of flow runs in place of Prefect.

The flow, the pure functions of `tasks.shards` and the lifecycle functions are real. A test kills a
process by raising `Killed` before or after one of the writes to the registry. In a shard it ends
the process of that shard, in reconcile the process of reconcile.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.states import Completed, Failed

from tasks import shards
from tasks.queues import QueueWatch
from tasks.reporting import limited, parked_text
from tasks.shards import EndedShard, Shard
from tests.lifecycle.fleet import FAMILY, POLICY, MemoryFleet, obstacle_text
from trans_peft.domain.evaluation import GatePolicy, Verdict
from trans_peft.domain.fleet import Fleet
from trans_peft.domain.outcome import Plan, TransferTask
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.lifecycle import transfer
from trans_peft.lifecycle.apply_verdicts import apply_verdicts
from trans_peft.lifecycle.reconcile import (
    is_still_needed,
    observe,
    observe_adapter,
    plan,
    revision,
)
from trans_peft.lifecycle.recovery.readiness import unprepared

WRITES = {
    "catalog": ("set_serving", "note_promotion"),
    "registry": ("set_alias", "record_manual_override", "register", "record"),
}


class Killed(BaseException):
    """Ends a process without cleaning up, as `kill -9` does."""


class Watched:
    """A port that calls `at` before and after each write."""

    def __init__(self, port: Any, writes: Sequence[str], at: Callable[[str], None]) -> None:
        self._port, self._writes, self._at = port, writes, at

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._port, name)
        if name not in self._writes:
            return method

        def write(*args: Any, **kwargs: Any) -> Any:
            self._at(f"before {name}")
            result = method(*args, **kwargs)
            self._at(f"after {name}")
            return result

        return write


@dataclass
class Run:
    id: UUID
    key: tuple
    tasks: tuple[TransferTask, ...]
    one_by_one: bool
    policy: GatePolicy = POLICY
    is_urgent: bool = False
    state: str = "Scheduled"
    started: bool = False


@dataclass
class FleetWithRuns:
    """A fleet, and the flow runs of its shards. `verdicts` are those other than passed.

    `reads` counts how often a run read the fleet, `looks` has the last looks that it recorded, and
    `reported` has the number of flow runs at the moment of each fleet report. `policy` is the gate
    policy of the deployment, and `successors` the parameters of the runs that others started.
    """

    folder: Path
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    promotion: PromotionPolicy = field(default_factory=PromotionPolicy)
    policy: GatePolicy = POLICY
    shard_size: int = 2
    slots: int = 1
    runs: list[Run] = field(default_factory=list)
    records: list[tuple] = field(default_factory=list)
    locked: set[str] = field(default_factory=set)
    moments: int = 0
    reads: int = 0
    looks: dict[str, str] = field(default_factory=dict)
    reported: list[int] = field(default_factory=list)
    plans: list[tuple[Plan, Mapping[str, str]]] = field(default_factory=list)
    successors: list[tuple[str | None, bool]] = field(default_factory=list)
    unserved: str = ""
    clock: str = ""
    at: Callable[[int, str], None] = lambda number, what: None

    def __post_init__(self) -> None:
        self.fleet = MemoryFleet(self.folder)
        plain = self.fleet.platform
        self.platform = replace(
            plain,
            catalog=Watched(plain.catalog, WRITES["catalog"], self._moment),
            registry=Watched(plain.registry, WRITES["registry"], self._moment),
        )

    def _moment(self, what: str) -> None:
        self.moments += 1
        self.at(self.moments, what)

    def reconcile(self, monkeypatch: pytest.MonkeyPatch, **parameters: Any) -> Any:
        """Run the flow function and return its state. Raises Killed if a test kills it."""
        from flows import reconcile as module

        with monkeypatch.context() as patch:
            patch.setattr(  # in one thread, so that a test can kill the process at any write
                "trans_peft.lifecycle.apply_verdicts.in_parallel", lambda *given: [*map(*given)]
            )
            for name in (
                *("deployed_policies", "reconciliation", "ingestion", "looks", "reporting"),
                "transfer",
            ):
                patch.setattr(module, name, getattr(self, f"_{name}"))
            for name in (
                *("start", "active_shards", "suspects", "cancel_shard", "wait", "why_unserved"),
            ):
                patch.setattr(module.shards, name, getattr(self, f"_{name}"))
            patch.setattr(
                module.recovery,
                "unprepared",
                lambda fleet, policy: unprepared(fleet, policy.recovery, self.platform.store),
            )
            patch.setattr(module.limits, "gpu_slot_count", lambda: self.slots)
            patch.setattr(module.worker, "check_clock", lambda: self.clock)
            given = {
                "policy": self.policy,
                "promotion": self.promotion,
                "shard_size": self.shard_size,
            }
            return module.reconcile.fn(**given | parameters)

    # The tasks without Prefect

    @property
    def _deployed_policies(self) -> SimpleNamespace:
        def start_successor(family: str | None, wait: bool) -> str:
            self.successors.append((family, wait))
            return "next-run"

        return SimpleNamespace(
            changed_policies=lambda policy, promotion: (
                "gate policy" if policy != self.policy else ""
            ),
            start_successor=start_successor,
        )

    @property
    def _reconciliation(self) -> SimpleNamespace:
        def apply_fleet_verdicts(family: str, policy: Any, promotion: Any) -> Any:
            while True:
                fleet, changes = apply_verdicts(
                    self._read(family), policy, promotion, self.platform
                )
                if not changes.is_outdated:
                    return fleet, changes

        return SimpleNamespace(
            base_families=self.platform.catalog.families,
            set_aside=lambda: self.platform.catalog.set_aside(),
            read_fleet=self._read,
            plan_fleet=plan,
            apply_fleet_verdicts=apply_fleet_verdicts,
        )

    def _read(self, family: str) -> Fleet:
        self.reads += 1
        return observe(family, self.platform)

    @property
    def _looks(self) -> SimpleNamespace:
        return SimpleNamespace(
            revision=lambda *given: revision(*given, self.platform),
            is_unchanged=lambda family, found, minutes: self.looks.get(family) == found,
            record_look=self.looks.__setitem__,
        )

    _ingestion = SimpleNamespace(
        prepare_for_upload=lambda: None, find_pending=lambda return_state: Completed(data=())
    )

    @property
    def _reporting(self) -> SimpleNamespace:
        return SimpleNamespace(
            publish_plan=lambda plan, unprepared=None: self.plans.append((plan, unprepared or {})),
            publish_fleet=lambda *a: self.reported.append(len(self.runs)),
            obstacle_text=obstacle_text,
            limited=limited,
            parked_text=parked_text,
        )

    @property
    def _transfer(self) -> SimpleNamespace:
        def record_failure(task: TransferTask, policy: Any, reason: str, return_state: bool) -> Any:
            try:
                fleet = observe_adapter(task.adapter, task.base.family, self.platform)
                if is_still_needed(task, fleet, policy):
                    transfer.record_failure(task, fleet, policy, self.platform, reason=reason)
            except Exception as error:
                return Failed(data=error, message=str(error))
            return Completed(data=None)

        return SimpleNamespace(record_failure=record_failure)

    # Prefect's part

    def _start(
        self,
        tasks: tuple[TransferTask, ...],
        policy: Any,
        *,
        size: int,
        one_by_one: bool,
        is_urgent: bool,
    ) -> Shard:
        key = (*(item.key for item in tasks), one_by_one, policy.sha256)
        for run in self.runs:
            if run.key == key and run.state in ("Scheduled", "Running"):
                return _shard(run, policy)
        run = Run(uuid4(), key, tasks, one_by_one, policy, is_urgent)
        self.runs.append(run)
        return _shard(run, policy)

    def _active_shards(self, family: str, policy: Any) -> tuple[Shard, ...]:
        active = (run for run in self.runs if run.state in ("Scheduled", "Running"))
        return tuple(_shard(run, policy) for run in active)

    def _suspects(self, family: str, policy: Any) -> frozenset:
        killed = [run for run in self.runs if run.state == "Crashed" and not run.one_by_one]
        return frozenset(
            (task.adapter, task.base) for run in killed if len(run.tasks) > 1 for task in run.tasks
        )

    def _cancel_shard(self, shard: Shard) -> bool:
        run = self._run(shard)
        if run.state == "Scheduled":
            run.state = "Withdrawn"
        return run.state == "Withdrawn"

    def _wait(
        self, groups: Mapping[str, Sequence[Shard]], watch: QueueWatch
    ) -> tuple[str, tuple[EndedShard, ...]]:
        while True:
            for name, group in groups.items():
                runs = [self._run(shard) for shard in group]
                over = [run for run in runs if run.state not in ("Scheduled", "Running")]
                if len(over) >= min(len(group), shards.enough_ended(self.slots)):
                    return name, tuple(map(_ended, over))
            self.work_one_shard()

    def _why_unserved(self, shards: Sequence[Shard]) -> str:
        return self.unserved if any(shard.is_waiting for shard in shards) else ""

    def _run(self, shard: Shard) -> Run:
        return next(run for run in self.runs if run.id == shard.run_id)

    def work_one_shard(self) -> None:
        """Run the waiting shard that was scheduled first, as a worker does."""
        waiting = [run for run in self.runs if run.state == "Scheduled"]
        if not waiting:
            return
        run = next((run for run in waiting if run.is_urgent), waiting[0])
        run.state, run.started = "Running", True
        try:
            if not run.one_by_one and len(run.tasks) > 1:
                self.evaluate_together(run.tasks)
            for task in run.tasks:
                if run.policy == self.policy:
                    self.judge(task)
        except Killed:
            run.state = "Crashed"
        else:
            run.state = "Completed"

    def evaluate_together(self, tasks: tuple[TransferTask, ...]) -> None:
        """Evaluate adapters in shared batches. Tests replace it, to kill the process there."""

    def judge(self, task: TransferTask) -> None:
        """Judge an adapter unless its lock is held or the work is no longer needed."""
        if task.adapter in self.locked:
            return
        fleet = observe_adapter(task.adapter, FAMILY, self.platform)
        if not is_still_needed(task, fleet, self.policy):
            return
        self.locked.add(task.adapter)
        plain, self.fleet.platform = self.fleet.platform, self.platform
        try:
            verdict = self.verdicts.get(task.adapter, Verdict.PASSED)
            outcome = self.fleet.judge(task, verdict, self.policy)
        finally:
            self.fleet.platform = plain
            self.locked.remove(task.adapter)
        self.records.append((outcome.adapter, outcome.base.version, outcome.verdict_key))

    @property
    def final_state(self) -> Any:
        """The state of the registry, without times and numbers of attempts."""
        seen = observe(FAMILY, self.fleet.platform)
        return {
            "serving": seen.serving,
            "notes": dict(seen.notes),
            "adapters": {
                adapter.name: (
                    [(v.base.version, v.number, v.transferred_from) for v in adapter.versions],
                    sorted((o.base.version, o.verdict) for o in adapter.outcomes),
                    {
                        alias: (
                            s.number,
                            s.is_manual,
                            s.recorded and (s.recorded.number, s.recorded.wanted),
                        )
                        for alias, s in adapter.aliases.items()
                    },
                )
                for adapter in seen.adapters
            },
        }


def _shard(run: Run, policy: GatePolicy) -> Shard:
    return Shard(
        run.id,
        run.tasks,
        is_waiting=run.state == "Scheduled",
        one_by_one=run.one_by_one,
        is_urgent=run.is_urgent,
        is_outdated=run.policy != policy,
    )


def _ended(run: Run) -> EndedShard:
    return EndedShard(
        str(run.id),
        run.tasks,
        run.state,
        never_ran=not run.started,
        is_cancelled=run.state in ("Cancelled", "Withdrawn"),
        is_crashed=run.state == "Crashed",
        one_by_one=run.one_by_one,
    )
