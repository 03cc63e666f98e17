"""Shards: cut the work, start each shard as a flow run of its own, wait for it, or withdraw it.

Several reconciles may be at work at once, and one may have died. So what is under way is asked of
Prefect, by the tags that every shard carries, and never remembered.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, cast
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from pydantic import TypeAdapter

from tasks.origin import inherited_tags
from trans_peft.domain.conventions import Deployment
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.identity import content_sha256
from trans_peft.domain.outcome import Plan, TransferTask

__all__ = [
    "EndedShard",
    "Shard",
    "active_shards",
    "cancel_shard",
    "cut",
    "in_flight",
    "missing",
    "obsolete_shards",
    "start",
    "unfinished_tasks",
    "wait",
]

_WORK = TypeAdapter(tuple[TransferTask, ...])
_POLL_S = 2.0
_PAGE = 200  # Prefect's own limit for one answer
_WITHDRAWN = "Withdrawn"
_NOT_OVER = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


@dataclass(frozen=True)
class Shard:
    """A shard that is not over: its flow run and the work in it. `waits`: it has not started."""

    run_id: UUID
    work: tuple[TransferTask, ...]
    waits: bool = False


@dataclass(frozen=True)
class EndedShard:
    """A shard whose flow run is over, one way or another. `withdrawn`: by a reconcile."""

    name: str
    work: tuple[TransferTask, ...]
    state_name: str
    never_ran: bool
    cancelled: bool
    crashed: bool
    message: str = ""

    @property
    def withdrawn(self) -> bool:
        """Whether a reconcile took it back before it started."""
        return self.state_name == _WITHDRAWN


def missing(plan: Plan, active_shards: Sequence[Shard]) -> tuple[TransferTask, ...]:
    """Return the work of a plan that no shard has, in the plan's order."""
    taken = {item.key for shard in active_shards for item in shard.work}
    return tuple(item for item in plan.work if item.key not in taken)


def obsolete_shards(plan: Plan, active_shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """Return the shards that wait and should not: unwanted work, or before work wanted more.

    A base that is wanted more than theirs has work that nobody does yet; in one queue, it would
    have to wait for them.
    """
    planned = {item.key for item in plan.work}
    rank = {base: i for i, base in enumerate(dict.fromkeys(w.base_version for w in plan.work))}
    first = min(
        (rank[item.base_version] for item in missing(plan, active_shards)), default=len(rank)
    )
    return tuple(
        shard
        for shard in active_shards
        if shard.waits
        and any(w.key not in planned or rank[w.base_version] > first for w in shard.work)
    )


def cut(work: Sequence[TransferTask], size: int) -> tuple[tuple[TransferTask, ...], ...]:
    """Return the work in shards: one base each, at most `size` adapters."""
    shards = []
    for base in dict.fromkeys(item.base_version for item in work):
        on_base = [item for item in work if item.base_version == base]
        shards += [tuple(on_base[i : i + size]) for i in range(0, len(on_base), size)]
    return tuple(shards)


def active_shards(family: str, policy: GatePolicy) -> tuple[Shard, ...]:
    """Return the shards of a family under this policy that are not over, whoever started them."""
    wanted = FlowRunFilter(
        tags=FlowRunFilterTags(all_=_tags(family, policy)),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_NOT_OVER)),
    )
    found: list[FlowRun] = []
    with get_client(sync_client=True) as client:
        for page in count():
            runs = client.read_flow_runs(flow_run_filter=wanted, limit=_PAGE, offset=page * _PAGE)
            found += runs
            if len(runs) < _PAGE:
                break
    shards = []
    for run in sorted(found, key=lambda run: str(run.id)):
        try:
            work = _WORK.validate_python(run.parameters["shard"])
        except (KeyError, ValueError):
            get_run_logger().warning("flow run %s has a shard's tags and is none", run.name)
            continue
        shards.append(Shard(run.id, work, run.state is None or run.state.is_scheduled()))
    return tuple(shards)


def start(family: str, work: tuple[TransferTask, ...], policy: GatePolicy) -> Shard:
    """Start a shard's flow run, or join the one that another reconcile started a moment ago.

    Prefect answers an idempotency key with the same run for ever; a run that is over and left the
    work undone is history, so the next key is taken.
    """
    key = content_sha256([family, [item.key for item in work], policy])
    for take in count():
        run = cast(  # a coroutine only in asynchronous code
            FlowRun,
            run_deployment(
                Deployment.TRANSFER_SHARD,
                parameters={"family": family, "shard": work, "policy": policy},
                idempotency_key=f"{key}:{take}",
                tags=[*_tags(family, policy), *inherited_tags()],
                timeout=0,
            ),
        )
        if run.state is None or not run.state.is_final():
            break
    return Shard(run.id, work, waits=True)


def cancel_shard(shard: Shard) -> None:
    """Take back a shard that waits. One that starts in this moment asks for itself what to do."""
    state: State[Any] = State(
        type=StateType.CANCELLED, name=_WITHDRAWN, message="no longer wanted, or wanted later"
    )
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(shard.run_id)
        if run.state is not None and run.state.is_scheduled():
            client.set_flow_run_state(shard.run_id, state)


def wait(groups: Mapping[str, Sequence[Shard]]) -> tuple[str, tuple[EndedShard, ...]]:
    """Wait until all shards of one group are over; return its name and how they ended."""
    logger = get_run_logger()
    said: dict[UUID, str] = {}
    ended: dict[UUID, EndedShard] = {}
    with get_client(sync_client=True) as client:
        while True:
            for shard in (shard for group in groups.values() for shard in group):
                if shard.run_id in ended:
                    continue
                run = client.read_flow_run(shard.run_id)
                if run.state is not None and run.state.name != said.get(shard.run_id, ""):
                    said[shard.run_id] = run.state.name or ""
                    logger.info(
                        "shard %s: %s %s", run.name, run.state.name, run.state.message or ""
                    )
                if run.state is not None and run.state.is_final():
                    ended[shard.run_id] = _ended(run, run.state, shard)
            for name, group in groups.items():
                if all(shard.run_id in ended for shard in group):
                    return name, tuple(ended[shard.run_id] for shard in group)
            time.sleep(_POLL_S)


def in_flight(ended: Sequence[EndedShard], plan: Plan) -> tuple[TransferTask, ...]:
    """Return what each killed shard was working on: the first of its work that is still missing.

    It counts as an attempt, so that an adapter that kills every process it meets is parked.
    """
    planned = {item.key for item in plan.work}
    return tuple(
        next(work for work in shard.work if work.key in planned)
        for shard in ended
        if shard.crashed and not shard.never_ran and any(w.key in planned for w in shard.work)
    )


def unfinished_tasks(ended: Sequence[EndedShard], plan: Plan) -> tuple[TransferTask, ...]:
    """Return what is not started again by the same run: its shard ended and did not do it.

    A person cancelled it, its process could not be started, or it broke before it came that far.
    What a killed shard had not begun is started again, and so is what was withdrawn.
    """
    undone = {
        item.key
        for shard in ended
        if not shard.withdrawn and (shard.never_ran or not shard.crashed)
        for item in shard.work
    }
    return tuple(item for item in plan.work if item.key in undone)


def _ended(run: FlowRun, state: State[Any], shard: Shard) -> EndedShard:
    return EndedShard(
        name=run.name,
        work=shard.work,
        state_name=state.name or "",
        never_ran=run.start_time is None,
        cancelled=state.is_cancelled(),
        crashed=state.is_crashed(),
        message=state.message or "",
    )


def _tags(family: str, policy: GatePolicy) -> list[str]:
    return [f"family:{family}", f"policy:{policy.sha256[:12]}"]
