"""Flow `reconcile`: judge each live adapter on each base that may serve, and apply the verdicts."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from tasks import (
    deployed_policies,
    ingestion,
    limits,
    looks,
    reconciliation,
    recovery,
    reporting,
    shards,
    transfer,
    worker,
)
from tasks.queues import QueueWatch
from tasks.shards import EndedShard, Shard
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.fleet import Fleet, FleetChanges
from trans_peft.domain.outcome import Plan
from trans_peft.domain.promotion import PromotionPolicy


@flow(name="reconcile")
def reconcile(  # noqa: PLR0913  the parameters of the deployment
    policy: GatePolicy,
    promotion: PromotionPolicy,
    shard_size: int,
    family: str | None = None,
    wait: bool = False,
    skip_unchanged_minutes: int = 0,
    dry_run: bool = False,
) -> State:
    """Compare the desired state of the fleets with the registry, and start what is missing.

    For each family, the run applies the known verdicts, ingests uploads, starts shards for missing
    verdicts, and applies the new verdicts when its shards have ended. Several runs can work at the
    same time. If a run dies, the next one continues its work. A run whose policies are not those of
    the deployment starts a run with the deployment's and ends, unless it is a dry run.

    Args:
        policy: Gate policy: when an adapter may serve on a new base.
        promotion: Promotion policy: when a base may serve.
        shard_size: Number of adapters in a shard, which are evaluated together. A shard can have
            more if it is estimated to take less than ten minutes.
        family: Base family to reconcile. None: all families.
        wait: Wait also for shards that other runs started.
        skip_unchanged_minutes: Do not read a fleet again if a run in the last minutes found nothing
            to do, and its base versions, their aliases, both policies and the versions of its
            adapters are the same. Changes of an adapter's tags and aliases are not noticed. 0 reads
            every fleet.
        dry_run: Publish the plan and change nothing.
    """
    if not dry_run:
        ingestion.prepare_for_upload()
        if changed := deployed_policies.changed_policies(policy, promotion):
            return _superseded(changed, family, wait)
    names = [name for name in reconciliation.base_families() if family in (None, name)]
    found = {name: _Family(name, policy, promotion, shard_size) for name in names}
    if dry_run:
        for one in found.values():
            one.publish_plan()
        problems = [problem for one in found.values() for problem in one.problems]
        if problems:
            return Failed(message="\n".join(["planned, nothing changed", *problems]))
        return Completed(message="planned, nothing changed")

    refused = [clock] if (clock := worker.check_clock()) else []
    pending = ingestion.find_pending(return_state=True)
    for one in found.values():  # before ingestion, so that a rollback does not wait for an upload
        if not one.is_unchanged(skip_unchanged_minutes):
            one.update()
    for one in found.values():  # after the shards were started: a large report takes seconds
        one.publish()
    if not pending.is_completed():
        refused.append(f"uploads cannot be listed: {pending.message}")
    for upload in pending.result() if pending.is_completed() else ():
        state = ingestion.ingest_pending(upload, return_state=True)
        if not state.is_completed():
            refused.append(f"{upload}: {state.message}")
        elif (base := state.result()) is not None and family in (None, base.family):
            fresh = _Family(base.family, policy, promotion, shard_size)
            found.setdefault(base.family, fresh).update()
    for one in found.values():
        one.publish()

    watch = QueueWatch(partial(_report_unserved, found))
    while awaited := {name: one.awaited(wait) for name, one in found.items() if one.awaited(wait)}:
        name, ended = shards.wait(awaited, watch)
        if changed := deployed_policies.changed_policies(policy, promotion):
            return _superseded(changed, family, wait)
        found[name].update(ended)
        found[name].publish()

    if family is None:
        refused += reconciliation.set_aside()
    if family not in (None, *found):
        refused.append(f"there is no base family {family!r}, and no upload of one")
    if why := shards.why_unserved([shard for one in found.values() for shard in one.others]):
        refused.append(why)
    if problems := refused + [problem for one in found.values() for problem in one.problems]:
        return Failed(message="\n".join(problems))
    others = sum(len(shard.tasks) for one in found.values() for shard in one.others)
    return Completed(
        message=f"other runs work on {others} verdicts" if others else "no verdict is missing"
    )


def _superseded(changed: str, family: str | None, wait: bool) -> State:
    """Start a run with the policies of the deployment; return the final state of this run."""
    successor = deployed_policies.start_successor(family, wait)
    return Failed(  # not cancelled, because Prefect would cancel its shards as well
        name="Superseded",
        message=f"the {changed} of this run and of the deployment differ: it was changed after "
        f"this run was created, or this run got its own. Run {successor} continues with the "
        "deployment's. To judge by another policy, change the deployment; to see its plan first, "
        "use dry_run",
    )


def _report_unserved(families: Mapping[str, "_Family"], why: str) -> None:
    """Write to the log and to the fleet reports that no worker serves the queue of the shards."""
    logger = get_run_logger()
    if why:
        logger.warning("%s", why)
    else:
        logger.info("a worker serves the queue again")
    for one in families.values():
        one.publish_warning(why if one.awaited(wait=True) else "")


@dataclass(frozen=True)
class _Update:
    """What one update of a family found: its revision before, the fleet, the changes, the plan."""

    revision: str
    fleet: Fleet
    changes: FleetChanges
    plan: Plan


@dataclass
class _Family:
    """The state of one family during one run.

    The methods raise no exceptions, so that a failure in one family does not affect the others.

    Attributes:
        name: Name of the base family.
        policy: Gate policy.
        promotion: Promotion policy.
        shard_size: Number of adapters that are evaluated together.
        started: Active shards that this run started.
        others: Active shards that other runs started.
        problems: Problems to report at the end of the run.
        left: Transfers that this run does not start again, by key, with the reason.
        warning: Text above the fleet report, such as that no worker serves the queue.
        last: What the last update found, None before the first one and after a failed one.
        published: What was published last.
    """

    name: str
    policy: GatePolicy
    promotion: PromotionPolicy
    shard_size: int
    started: tuple[Shard, ...] = ()
    others: tuple[Shard, ...] = ()
    problems: tuple[str, ...] = ()
    left: dict[tuple, str] = field(default_factory=dict)
    warning: str = ""
    last: _Update | None = None
    published: _Update | None = None

    def awaited(self, wait: bool) -> tuple[Shard, ...]:
        """Return the shards for which this run waits."""
        return self.started + self.others if wait else self.started

    def publish_plan(self) -> None:
        """Publish the plan, and change nothing."""
        with self._collecting_errors():
            fleet = reconciliation.read_fleet(self.name)
            plan = reconciliation.plan_fleet(fleet, self.policy)
            reporting.publish_plan(plan, recovery.unprepared(fleet, self.policy))

    def is_unchanged(self, minutes: int) -> bool:
        """Return whether a run in the last minutes found nothing to do, and nothing changed."""
        if not minutes:
            return False
        with self._collecting_errors():
            revision = looks.revision(self.name, self.policy, self.promotion)
            return looks.is_unchanged(self.name, revision, minutes)
        return True  # the problem is reported, and reading the fleet would fail as well

    def update(self, ended: tuple[EndedShard, ...] = ()) -> None:
        """Apply the known verdicts, and start shards for missing ones. `ended` are ended shards."""
        self.last = None
        with self._collecting_errors():
            self._update(ended)

    def publish(self) -> None:
        """Publish the plan and the report of the last update, unless they are published.

        Record the update if nothing is left to do, so that a scheduled run can skip the family.
        """
        if self.last is None or self.last is self.published:
            return
        self.published = self.last
        with self._collecting_errors():
            reporting.publish_plan(self.last.plan)
            reporting.publish_fleet(self.last.fleet, self.last.changes, self.warning)
            is_left = self.last.plan.trainings or self.last.changes.obstacle
            if not (self.problems or self.awaited(wait=True) or is_left):
                looks.record_look(self.name, self.last.revision)

    def publish_warning(self, warning: str) -> None:
        """Publish the fleet report with another warning. A failure does not affect the run."""
        changed, self.warning = warning != self.warning, warning
        if changed and self.last is not None:
            reporting.publish_fleet(self.last.fleet, self.last.changes, warning, return_state=True)

    @contextmanager
    def _collecting_errors(self) -> Iterator[None]:
        """Turn an exception into a problem of this family, and stop waiting for its shards."""
        try:
            yield
        except Exception as error:
            self.started = self.others = ()
            self.problems = (
                *self.problems,
                f"the family {self.name} cannot be reconciled: {type(error).__name__}: {error}",
            )

    def _update(self, ended: tuple[EndedShard, ...]) -> None:
        before = shards.active_shards(self.name, self.policy)
        revision = looks.revision(self.name, self.policy, self.promotion)
        fleet, changes = reconciliation.apply_fleet_verdicts(self.name, self.policy, self.promotion)
        plan = reconciliation.plan_fleet(fleet, self.policy)
        killed = shards.interrupted_transfers(ended, plan)
        for lost in killed:
            state = transfer.record_failure(
                lost, self.policy, reason="its process was killed", return_state=True
            )
            if not state.is_completed():
                self.left[lost.key] = (
                    f"{lost}: its process was killed, and this attempt could not be recorded: "
                    f"{state.message}"
                )
        if killed:
            fleet = reconciliation.read_fleet(self.name)
            plan = reconciliation.plan_fleet(fleet, self.policy)
        for end in ended:
            reason = f"shard {end.name} ended as {end.state_name}; the next run continues its work"
            if end.message:
                reason += f": {end.message}"
            self.left |= {task.key: reason for task in shards.unfinished_tasks([end], plan)}

        # With those that were active before the fleet was read: a verdict of a shard that ended
        # meanwhile may not be in the fleet.
        after = shards.active_shards(self.name, self.policy)
        active_shards = tuple({shard.run_id: shard for shard in (*before, *after)}.values())
        withdrawn = [
            shard
            for shard in shards.obsolete_shards(plan, active_shards, self.left)
            if shards.cancel_shard(shard)
        ]
        active_shards = tuple(
            shard for shard in active_shards if not (shard in withdrawn or shard.is_outdated)
        )
        todo = [task for task in shards.missing(plan, active_shards) if task.key not in self.left]
        ours = {shard.run_id for shard in self.started}
        self.others = tuple(shard for shard in active_shards if shard.run_id not in ours)
        self.started = tuple(shard for shard in active_shards if shard.run_id in ours)
        suspects = shards.suspects(self.name, self.policy) if todo else frozenset()
        slots = limits.gpu_slot_count() if todo else 1
        free = max(shards.max_active(slots) - len(active_shards), 0)
        for part in shards.split_into_shards(todo, self.shard_size, slots)[:free]:
            one_by_one = any((task.adapter, task.base) in suspects for task in part)
            shard = shards.start(
                part,
                self.policy,
                size=self.shard_size,
                one_by_one=one_by_one,
                is_urgent=part[0].base == plan.awaited,
            )
            self.started += (shard,)
        untrained = [
            f"{recipe.adapter} on {recipe.base_version}: retraining failed three times"
            for recipe in plan.trainings
            if not recovery.start_training(recipe, self.policy)
        ]
        self.problems = (*self._problems(plan, changes), *untrained)
        self.last = _Update(revision, fleet, changes, plan)

    def _problems(self, plan: Plan, changes: FleetChanges) -> Iterator[str]:
        if changes.is_refused or (changes.obstacle and not self.awaited(wait=True)):
            yield reporting.obstacle_text(changes)
        yield from reporting.limited(dict.fromkeys(self.left.values()))
        yield from reporting.limited(map(reporting.parked_text, plan.parked))
        yield from reporting.limited(plan.unreadable)
