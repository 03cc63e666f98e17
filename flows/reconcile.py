"""Every live adapter gets a verdict on every base that may serve; then the verdicts take effect."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from tasks import ingestion, reconciliation, recovery, reporting, shards, transfer
from tasks.shards import EndedShard, Shard
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.outcome import FleetChanges, Plan
from trans_peft.domain.promotion import PromotionPolicy


@flow(name="reconcile")
def reconcile(
    policy: GatePolicy,
    promotion: PromotionPolicy,
    shard_size: int,
    family: str | None = None,
    wait: bool = False,
    dry_run: bool = False,
) -> State:
    """Compare what should be known about a family (None: all) with the registry; do the rest.

    It looks at each family, starts what is missing, and looks again when that is over. It waits for
    the shards that it started; with `wait`, also for those that it found under way. Any number of
    these runs may be at work at once, and one that dies is continued by the next. `dry_run` shows
    the plan and changes nothing.
    """
    names = [name for name in reconciliation.base_families() if family in (None, name)]
    found = {name: _Family(name, policy, promotion, shard_size) for name in names}
    if dry_run:
        for one in found.values():
            one.publish_plan()
        problems = [problem for one in found.values() for problem in one.problems]
        if problems:
            return Failed(message="\n".join(["planned, nothing changed", *problems]))
        return Completed(message="planned, nothing changed")

    for one in found.values():  # what is known takes effect first: a rollback waits for no upload
        one.look()
    refused = []
    waiting = ingestion.find_pending(return_state=True)
    if not waiting.is_completed():
        refused.append(f"uploads cannot be listed: {waiting.message}")
    for upload in waiting.result() if waiting.is_completed() else ():
        state = ingestion.ingest_pending(upload, return_state=True)
        if not state.is_completed():
            refused.append(f"{upload}: {state.message}")
        elif (base := state.result()) is not None and family in (None, base.family):
            fresh = _Family(base.family, policy, promotion, shard_size)
            found.setdefault(base.family, fresh).look()

    while watched := {name: one.watched(wait) for name, one in found.items() if one.watched(wait)}:
        name, ended = shards.wait(watched)
        found[name].look(ended)

    if family is None:
        refused += reconciliation.set_aside()
    if family not in (None, *found):
        refused.append(f"there is no base family {family!r}, nor an upload that would make one")
    if problems := refused + [problem for one in found.values() for problem in one.problems]:
        return Failed(message="\n".join(problems))
    others = sum(len(shard.work) for one in found.values() for shard in one.others)
    return Completed(message=f"{others} verdicts are under way" if others else "nothing is missing")


@dataclass
class _Family:
    """One family in the course of one run: what is under way, and what is wrong.

    What goes wrong in one family is a problem of that family: no exception leaves a method.
    """

    name: str
    policy: GatePolicy
    promotion: PromotionPolicy
    shard_size: int
    started: tuple[Shard, ...] = ()
    others: tuple[Shard, ...] = ()
    problems: tuple[str, ...] = ()
    left: dict[tuple, str] = field(default_factory=dict)

    def watched(self, wait: bool) -> tuple[Shard, ...]:
        """Return the shards whose end is waited for."""
        return self.started + self.others if wait else self.started

    def publish_plan(self) -> None:
        """Publish what is missing, and change nothing."""
        with self._kept_apart():
            reporting.publish_plan(reconciliation.plan_fleet(self.name, self.policy))

    def look(self, ended: tuple[EndedShard, ...] = ()) -> None:
        """Let what is known take effect, and see to it that what is missing is under way."""
        with self._kept_apart():
            self._look(ended)

    @contextmanager
    def _kept_apart(self) -> Iterator[None]:
        """Turn an exception into a problem of this family, and watch its shards no longer."""
        try:
            yield
        except Exception as error:
            self.started = self.others = ()
            self.problems = (
                *self.problems,
                f"the family {self.name} cannot be reconciled: {type(error).__name__}: {error}",
            )

    def _look(self, ended: tuple[EndedShard, ...]) -> None:
        changes = reconciliation.apply_fleet_verdicts(self.name, self.policy, self.promotion)
        plan = reconciliation.plan_fleet(self.name, self.policy)
        for lost in shards.in_flight(ended, plan):
            state = transfer.record_failure(
                self.name, lost, self.policy, reason="its process was killed", return_state=True
            )
            if not state.is_completed():
                self.left[lost.key] = (
                    f"{lost}: its process was killed, and this attempt could not be recorded: "
                    f"{state.message}"
                )
            plan = reconciliation.plan_fleet(self.name, self.policy)
        for end in ended:
            told = (
                f"shard {end.name}: {end.state_name}, left for the next run {end.message}".strip()
            )
            self.left |= {work.key: told for work in shards.unfinished_tasks([end], plan)}

        active_shards = shards.active_shards(self.name, self.policy)
        for shard in (waste := shards.obsolete_shards(plan, active_shards)):
            shards.cancel_shard(shard)
        active_shards = tuple(shard for shard in active_shards if shard not in waste)
        todo = [work for work in shards.missing(plan, active_shards) if work.key not in self.left]
        ours = {shard.run_id for shard in self.started}
        self.others = tuple(shard for shard in active_shards if shard.run_id not in ours)
        self.started = tuple(shard for shard in active_shards if shard.run_id in ours)
        for part in shards.cut(todo, self.shard_size):
            self.started += (shards.start(self.name, part, self.policy),)
        untrained = [
            f"{recipe.adapter} on {recipe.base_version}: training anew failed three times"
            for recipe in plan.trainings
            if not recovery.start_training(recipe, self.policy)
        ]
        self.problems = (*self._problems(plan, changes), *untrained)
        reporting.publish_plan(plan)  # what people read waits for what is started, not it for them
        reporting.publish_fleet(self.name, changes)

    def _problems(self, plan: Plan, changes: FleetChanges) -> Iterator[str]:
        if changes.refused:
            yield changes.refused
        if changes.waiting and not self.watched(wait=True):
            yield changes.waiting
        yield from dict.fromkeys(self.left.values())
        yield from (f"parked for a person: {work}" for work in plan.parked)
        yield from plan.unreadable
