"""Shards: divide the transfers, start each shard as a flow run, wait for it, or withdraw it.

Several reconcile runs can work at once, and each can die. Active shards are therefore always read
from Prefect, by the tags of their flow runs.
"""

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Any, cast
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterIdempotencyKey,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, TaskRun
from prefect.client.schemas.responses import SetStateStatus
from prefect.client.schemas.sorting import FlowRunSort, TaskRunSort
from prefect.deployments import run_deployment
from pydantic import TypeAdapter

from tasks.limits import gpu_slot_count
from tasks.origin import inherited_tags
from tasks.queues import UNSERVED_AFTER_S, QueueWatch, unserved
from tasks.worker import code_tag
from trans_peft.domain.base import BaseRef
from trans_peft.domain.conventions import WORKER_STOPPED, Deployment
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.identity import content_sha256, json_value
from trans_peft.domain.outcome import Plan, TransferTask

__all__ = [
    "EndedShard",
    "Shard",
    "Suspect",
    "active_shards",
    "cancel_shard",
    "enough_ended",
    "interrupted_transfers",
    "max_active",
    "missing",
    "obsolete_shards",
    "split_into_shards",
    "start",
    "suspects",
    "unfinished_tasks",
    "wait",
    "why_unserved",
]

_MIN_WAITING = 8
"""Waiting shards of a family on few GPU slots. Fewer would mean more reads of its fleet."""

_MAX_GROUPS = 8
_MAX_TASKS = 1_000  # Prefect accepts 512 KiB of parameters, and a transfer has about 400 bytes
_SHARD_S = 600.0
"""Bounds of a shard with more than `shard_size` adapters. A promotion waits for running shards."""

_HEAD_START = timedelta(days=1)
"""Prefect starts the runs of a queue in the order of their scheduled times. A shard of a promotion
therefore goes ahead of all runs but those that have waited for so long."""

_PROMOTION = "promotion"
"""Tag of the run of such a shard."""

Suspect = tuple[str, BaseRef]
"""The name of an adapter that may have killed a process, and the base."""

_TASKS = TypeAdapter(tuple[TransferTask, ...])
_POLL_S = 2.0
_MAX_DELAY = timedelta(minutes=1)
"""Time from the end of a shard until `wait` returns, if fewer than `enough_ended` have ended."""
_PAGE = 200  # Prefect's own limit for one answer
_WITHDRAWN = "Withdrawn"
_STOPPED = (
    "Execution was aborted by a termination signal",
    "Execution was cancelled by the runtime environment",
    WORKER_STOPPED,
)
"""How Prefect's and this project's messages of crashed runs begin if a signal ended the process,
for example by `make down` or because a machine is taken away. No adapter causes that."""
_NOT_OVER = [
    *(StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED),
    StateType.CANCELLING,
]


@dataclass(frozen=True)
class Shard:
    """A shard that has not ended.

    Attributes:
        run_id: Id of its flow run.
        tasks: Its transfers.
        is_waiting: Whether the flow run has not started.
        one_by_one: Whether it evaluates no two adapters in one batch.
        is_urgent: Whether a promotion waited for it when it was started.
        is_outdated: Whether it has another gate policy than the deployment of reconcile.
    """

    run_id: UUID
    tasks: tuple[TransferTask, ...]
    is_waiting: bool = False
    one_by_one: bool = False
    is_urgent: bool = False
    is_outdated: bool = False


@dataclass(frozen=True)
class EndedShard:
    """A shard whose flow run has ended.

    Attributes:
        name: Name of the flow run.
        tasks: Its transfers.
        state_name: Name of the final state.
        never_ran: Whether it ended before it started.
        is_cancelled: Whether it was cancelled.
        is_crashed: Whether its process was killed or lost.
        message: Message of the final state.
        one_by_one: Whether it evaluated no two adapters in one batch.
        ended_tasks: Names of its task runs that completed or failed. Read if it was killed.
    """

    name: str
    tasks: tuple[TransferTask, ...]
    state_name: str
    never_ran: bool
    is_cancelled: bool
    is_crashed: bool
    message: str = ""
    one_by_one: bool = False
    ended_tasks: frozenset[str] = frozenset()

    @property
    def is_withdrawn(self) -> bool:
        """Whether reconcile withdrew it before it started."""
        return self.state_name == _WITHDRAWN

    @property
    def was_killed(self) -> bool:
        """Whether its process was killed or lost while it worked, and not stopped from outside."""
        return self.is_crashed and not self.never_ran and not _was_stopped(self.message)


def max_active(slots: int) -> int:
    """Return how many shards of a family may run or wait, on this many GPU slots.

    Prefect starts the runs of a queue in the order in which they became due. A shard of another
    family waits for those that wait already, so each family keeps few of them waiting: two rounds
    of all slots. Families that all have more to do then take turns.
    """
    return slots + _waiting(slots)


def enough_ended(slots: int) -> int:
    """Return after how many ended shards a run reads the fleet and starts the next ones.

    It does so after a minute with fewer. The other half of the waiting shards occupies the slots
    meanwhile.
    """
    return _waiting(slots) // 2


def _waiting(slots: int) -> int:
    return max(2 * slots, _MIN_WAITING)


def missing(plan: Plan, active_shards: Sequence[Shard]) -> tuple[TransferTask, ...]:
    """Return the transfers of a plan that are in no active shard, in the plan's order.

    An outdated shard does not count, because it skips its transfers.
    """
    taken = {item.key for shard in active_shards if not shard.is_outdated for item in shard.tasks}
    return tuple(item for item in plan.tasks if item.key not in taken)


def obsolete_shards(
    plan: Plan, active_shards: Sequence[Shard], left: Collection[tuple[Any, ...]] = ()
) -> tuple[Shard, ...]:
    """Return the waiting shards to withdraw.

    These are outdated shards, shards with transfers that are no longer planned, shards whose base
    comes after a base with transfers in no shard, and shards for which a promotion waits by now. In
    one queue, these would have to wait for less urgent ones. No shard is withdrawn for a transfer
    whose key is in `left`: this run does not start it.
    """
    planned = {item.key for item in plan.tasks}
    rank = {base: i for i, base in enumerate(dict.fromkeys(w.base for w in plan.tasks))}
    todo = (item for item in missing(plan, active_shards) if item.key not in left)
    first = min((rank[item.base] for item in todo), default=len(rank))
    return tuple(
        shard
        for shard in active_shards
        if shard.is_waiting
        and (
            shard.is_outdated
            or any(
                w.key not in planned
                or rank[w.base] > first
                or (w.base == plan.awaited and not shard.is_urgent)
                for w in shard.tasks
            )
        )
    )


def split_into_shards(
    tasks: Sequence[TransferTask], size: int, slots: int = 1
) -> tuple[tuple[TransferTask, ...], ...]:
    """Divide transfers into shards of one base.

    A shard has `size` adapters. It has up to eight times as many while it is estimated to take less
    than ten minutes, because a process needs seconds to start and to load the base, as long as
    there are two shards for each GPU slot. A transfer without an estimate counts as the median of
    the others.
    """
    slots = max(slots, 1)  # no slots: a person empties the pool, and the shards wait
    known = [item.estimated_seconds for item in tasks if item.estimated_seconds]
    typical_s = median(known) if known else _SHARD_S
    shards: list[tuple[TransferTask, ...]] = []
    for base in dict.fromkeys(item.base for item in tasks):
        on_base = [item for item in tasks if item.base == base]
        most = min(max(size, -(-len(on_base) // (2 * slots))), _MAX_GROUPS * size, _MAX_TASKS)
        part: list[TransferTask] = []
        seconds = 0.0
        for item in on_base:
            takes_s = typical_s if item.estimated_seconds is None else item.estimated_seconds
            if len(part) == most or (len(part) >= size and seconds + takes_s > _SHARD_S):
                shards.append(tuple(part))
                part, seconds = [], 0.0
            part.append(item)
            seconds += takes_s
        shards.append(tuple(part))
    return tuple(shards)


def active_shards(family: str, policy: GatePolicy) -> tuple[Shard, ...]:
    """Return the shards of a family that have not ended, of all reconcile runs.

    Those of another policy are outdated.
    """
    family_tag, policy_tag = _tags(family, policy)
    wanted = _wanted([family_tag], _NOT_OVER)
    found: list[FlowRun] = []
    with get_client(sync_client=True) as client:
        while True:
            runs = client.read_flow_runs(
                flow_run_filter=wanted,
                limit=_PAGE,
                offset=len(found),
                sort=FlowRunSort.ID_DESC,  # a start between two pages changes other orders
            )
            found += runs
            if len(runs) < _PAGE:
                break
    return tuple(_shards(sorted(found, key=lambda run: str(run.id)), policy_tag))


def suspects(family: str, policy: GatePolicy) -> frozenset[Suspect]:
    """Return the adapters of killed shards whose adapters shared batches, each with its base.

    One of them may have killed the process. Evaluated one by one, it is known. Reads the newest 200
    crashed runs of the family, so that a crash counts even if its reconcile run died as well.
    """
    wanted = _wanted(_tags(family, policy), [StateType.CRASHED])
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_run_filter=wanted, limit=_PAGE, sort=FlowRunSort.END_TIME_DESC
        )
    died = (
        run
        for run in runs
        if run.start_time is not None and not _was_stopped(run.state.message if run.state else None)
    )
    killed = _shards(died, _tags(family, policy)[1])
    return frozenset(
        (task.adapter, task.base)
        for shard in killed
        if not _is_alone(shard)
        for task in shard.tasks
    )


def _wanted(tags: Sequence[str], states: list[StateType]) -> FlowRunFilter:
    return FlowRunFilter(
        tags=FlowRunFilterTags(all_=list(tags)),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states)),
    )


def _shards(runs: Iterable[FlowRun], policy_tag: str) -> Iterator[Shard]:
    """Yield the shard of each flow run. A run whose parameters cannot be read is ignored."""
    for run in runs:
        try:
            tasks = _TASKS.validate_python(run.parameters["shard"])
        except (KeyError, ValueError):
            get_run_logger().warning(
                "flow run %s has the tags of a shard, but its parameter `shard` cannot be read: "
                "ignored",
                run.name,
            )
            continue
        yield Shard(
            run.id,
            tasks,
            is_waiting=_is_waiting(run),
            one_by_one=run.parameters.get("one_by_one") is True,
            is_urgent=_PROMOTION in run.tags,
            is_outdated=policy_tag not in run.tags,
        )


def start(
    tasks: tuple[TransferTask, ...],
    policy: GatePolicy,
    *,
    size: int,
    one_by_one: bool = False,
    is_urgent: bool = False,
) -> Shard:
    """Start the flow run of a shard of one base, or return the active one with the same transfers.

    `size`: the number of adapters that it evaluates together. `one_by_one`: evaluate no two
    adapters in one batch. `is_urgent`: go ahead of runs that became due in the last `_HEAD_START`,
    because a promotion waits for the shard.

    Prefect returns the same run for an idempotency key for ever. If that run has ended without
    doing its transfers, the next key starts a new run.
    """
    base = tasks[0].base
    tags = [*_tags(base.family, policy), code_tag(), *inherited_tags()]
    key = content_sha256([[item.key for item in tasks], policy, *(["alone"] if one_by_one else [])])
    attempt = 0
    while True:
        run = cast(  # `run_deployment` returns a coroutine in asynchronous code only
            FlowRun,
            run_deployment(
                Deployment.TRANSFER_SHARD,
                # As `json_value`, so that a worker with older code can read them.
                parameters={
                    "shard": json_value(tasks),
                    "policy": json_value(policy),
                    "one_by_one": one_by_one,
                    **({"size": size} if len(tasks) > size else {}),
                },
                flow_run_name=f"judge {base}",
                idempotency_key=f"{key}:{attempt}",
                scheduled_time=datetime.now(UTC) - _HEAD_START if is_urgent else None,
                tags=[*tags, _PROMOTION] if is_urgent else tags,
                timeout=0,
            ),
        )
        if run.state is None or not run.state.is_final():
            break
        attempt = _newest_attempt(key, attempt) + 1
    return Shard(run.id, tasks, is_waiting=True, one_by_one=one_by_one, is_urgent=is_urgent)


def _newest_attempt(key: str, attempt: int) -> int:
    """Return the newest attempt of a shard among the next 200; `attempt` if there are no others.

    An outage of days has hundreds of them.
    """
    attempts = {f"{key}:{later}": later for later in range(attempt + 1, attempt + 1 + _PAGE)}
    wanted = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=list(attempts)))
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=wanted, limit=_PAGE)
    return max((attempts[str(run.idempotency_key)] for run in runs), default=attempt)


def cancel_shard(shard: Shard) -> bool:
    """Withdraw a waiting shard; return whether it did not start meanwhile.

    One that has just started skips its needless transfers itself.
    """
    state: State[Any] = State(
        type=StateType.CANCELLED,
        name=_WITHDRAWN,
        message="no longer needed, or less urgent than other transfers",
    )
    with get_client(sync_client=True) as client:
        ((_, run),) = _with_runs([shard], client)
        if run is None:
            return True
        if run.state is None or not run.state.is_scheduled():
            return False
        return client.set_flow_run_state(shard.run_id, state).status is SetStateStatus.ACCEPT


def wait(
    groups: Mapping[str, Sequence[Shard]], watch: QueueWatch
) -> tuple[str, tuple[EndedShard, ...]]:
    """Wait until all shards of one group or `enough_ended` of them have ended.

    Returns no later than a minute after the first shard of a group has ended.

    The end times are Prefect's, so that this minute includes what a run did between two calls.

    Returns the group's name and its ended shards. A poll is one request for 200 shards. `watch`
    reports if no worker serves the queue of a waiting shard. Pass the same one to all calls of a
    run.
    """
    logger = get_run_logger()
    logged: dict[UUID, str] = {}
    ended: dict[UUID, EndedShard] = {}
    ended_at: dict[UUID, datetime] = {}
    enough = enough_ended(gpu_slot_count())
    awaited = [shard for group in groups.values() for shard in group]
    with get_client(sync_client=True) as client:
        while True:
            waiting: list[FlowRun] = []
            pending = [shard for shard in awaited if shard.run_id not in ended]
            for shard, run in _with_runs(pending, client):
                if run is None:
                    ended[shard.run_id] = _deleted(shard)
                    ended_at[shard.run_id] = _now()
                    continue
                if run.state is not None and run.state.name != logged.get(shard.run_id, ""):
                    logged[shard.run_id] = run.state.name or ""
                    message = f": {run.state.message}" if run.state.message else ""
                    logger.info("shard %s: %s%s", run.name, run.state.name, message)
                if run.state is not None and run.state.is_final():
                    ended[shard.run_id] = _with_ended_tasks(
                        _ended(run, run.state, shard), shard.run_id, client
                    )
                    ended_at[shard.run_id] = run.state.timestamp
                elif _is_waiting(run):
                    waiting.append(run)
            for name, group in groups.items():
                over = [shard.run_id for shard in group if shard.run_id in ended]
                now = _now()
                is_late = now - min((ended_at[one] for one in over), default=now) >= _MAX_DELAY
                if is_late or len(over) >= min(len(group), enough):
                    return name, tuple(ended[one] for one in over)
            watch.check(waiting, client)
            time.sleep(_POLL_S)


def _now() -> datetime:
    return datetime.now(UTC)


def why_unserved(shards: Sequence[Shard]) -> str:
    """Return why waiting shards of other runs cannot start; empty if they can, or are new."""
    with get_client(sync_client=True) as client:
        for _, run in _with_runs([shard for shard in shards if shard.is_waiting], client):
            if run is None:
                continue
            created = run.created or datetime.now(UTC)
            waits_s = (datetime.now(UTC) - created).total_seconds()
            if _is_waiting(run) and waits_s > UNSERVED_AFTER_S:
                return unserved([run], client)
    return ""


def interrupted_transfers(ended: Sequence[EndedShard], plan: Plan) -> tuple[TransferTask, ...]:
    """Return the transfer that each killed shard was working on.

    It is the first that is still planned and whose task run did not end. It counts as a failed
    attempt, so that an adapter that kills each process is parked in the end. A shard whose adapters
    share batches may have been working on any of them (`suspects`).
    """
    planned = {item.key for item in plan.tasks}
    found = []
    for shard in ended:
        if shard.was_killed and _is_alone(shard):
            left = [task for task in shard.tasks if task.key in planned]
            found += [one for one in left if _task_run_name(one) not in shard.ended_tasks][:1]
    return tuple(found)


def _task_run_name(task: TransferTask) -> str:
    """Return the name of the task run of a transfer, as `tasks.transfer` names it."""
    return f"transfer {task.adapter} to {task.base}"


def _with_ended_tasks(shard: EndedShard, run_id: UUID, client: SyncPrefectClient) -> EndedShard:
    """Return the shard with the names of its ended task runs, if it was killed."""
    if not (shard.was_killed and _is_alone(shard)):
        return shard
    over = TaskRunFilterStateType(any_=[StateType.COMPLETED, StateType.FAILED])
    found: list[TaskRun] = []
    while True:
        runs = client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id])),
            task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=over)),
            limit=_PAGE,
            offset=len(found),
            sort=TaskRunSort.ID_DESC,
        )
        found += runs
        if len(runs) < _PAGE:
            return replace(shard, ended_tasks=frozenset(run.name for run in found))


def _was_stopped(message: str | None) -> bool:
    """Return whether the message of a crashed run says that it was stopped from outside."""
    return (message or "").startswith(_STOPPED)


def _is_alone(shard: Shard | EndedShard) -> bool:
    return shard.one_by_one or len(shard.tasks) == 1


def unfinished_tasks(ended: Sequence[EndedShard], plan: Plan) -> tuple[TransferTask, ...]:
    """Return the planned transfers that the same run does not start again.

    Its shard was cancelled, could not start, or failed before it reached them. The remaining
    transfers of shards that were killed or withdrawn are started again.
    """
    undone = {
        item.key
        for shard in ended
        if not shard.is_withdrawn and (shard.never_ran or not shard.is_crashed)
        for item in shard.tasks
    }
    return tuple(item for item in plan.tasks if item.key in undone)


def _with_runs(
    shards: Sequence[Shard], client: SyncPrefectClient
) -> Iterator[tuple[Shard, FlowRun | None]]:
    """Yield each shard with its flow run, or None if the run was deleted. One request a page."""
    for first in range(0, len(shards), _PAGE):
        page = shards[first : first + _PAGE]
        wanted = FlowRunFilter(id=FlowRunFilterId(any_=[shard.run_id for shard in page]))
        found = {run.id: run for run in client.read_flow_runs(flow_run_filter=wanted, limit=_PAGE)}
        yield from ((shard, found.get(shard.run_id)) for shard in page)


def _deleted(shard: Shard) -> EndedShard:
    """Return a shard whose flow run was deleted: it ended as a cancelled one does."""
    return EndedShard(
        name=str(shard.run_id),
        tasks=shard.tasks,
        state_name="deleted",
        never_ran=False,
        is_cancelled=True,
        is_crashed=False,
    )


def _is_waiting(run: FlowRun) -> bool:
    return run.state is None or run.state.is_scheduled()


def _ended(run: FlowRun, state: State[Any], shard: Shard) -> EndedShard:
    return EndedShard(
        name=run.name,
        tasks=shard.tasks,
        state_name=state.name or "",
        never_ran=run.start_time is None,
        is_cancelled=state.is_cancelled(),
        is_crashed=state.is_crashed(),
        message=state.message or "",
        one_by_one=shard.one_by_one,
    )


def _tags(family: str, policy: GatePolicy) -> tuple[str, str]:
    return f"family:{family}", f"policy:{policy.sha256[:12]}"
