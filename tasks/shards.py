"""Shards: cut the work, start each shard as a flow run of its own, wait for it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import cast
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment

from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.identity import content_sha256
from trans_peft.domain.outcome import Plan, Work

__all__ = ["Ended", "Started", "cut", "in_flight", "start", "wait"]

_POLL_S = 2.0


@dataclass(frozen=True)
class Started:
    """A shard under way: its flow run and the work in it."""

    run_id: UUID
    work: tuple[Work, ...]


@dataclass(frozen=True)
class Ended:
    """A shard whose flow run is over, one way or another."""

    name: str
    work: tuple[Work, ...]
    state_name: str
    never_ran: bool
    cancelled: bool
    crashed: bool


def cut(work: Sequence[Work], size: int) -> tuple[tuple[Work, ...], ...]:
    """Return the work in shards: one base each, at most `size` adapters."""
    shards = []
    for base in dict.fromkeys(item.base_version for item in work):
        on_base = [item for item in work if item.base_version == base]
        shards += [tuple(on_base[i : i + size]) for i in range(0, len(on_base), size)]
    return tuple(shards)


def start(family: str, work: tuple[Work, ...], policy: GatePolicy) -> Started:
    """Start a shard's flow run, or join the one that already does the same work.

    Prefect answers an idempotency key with the same run for ever; a run that is over and left the
    work undone is history, so the next key is taken.
    """
    key = content_sha256([family, work, policy])
    for take in count():
        run = cast(  # a coroutine only in asynchronous code
            FlowRun,
            run_deployment(
                "transfer-shard/default",
                parameters={"family": family, "shard": work, "policy": policy},
                idempotency_key=f"{key}:{take}",
                timeout=0,
            ),
        )
        if run.state is None or not run.state.is_final():
            break
    return Started(run.id, work)


def wait(shard: Started) -> Ended:
    """Wait until a shard's flow run is over and return how it ended."""
    logger = get_run_logger()
    said = ""
    with get_client(sync_client=True) as client:
        while True:
            run = client.read_flow_run(shard.run_id)
            state = run.state
            if state is not None and state.name != said:
                said = state.name or ""
                logger.info("shard %s: %s %s", run.name, said, state.message or "")
            if state is not None and state.is_final():
                return Ended(
                    name=run.name,
                    work=shard.work,
                    state_name=said,
                    never_ran=run.start_time is None,
                    cancelled=state.is_cancelled(),
                    crashed=state.is_crashed(),
                )
            time.sleep(_POLL_S)


def in_flight(ended: Sequence[Ended], plan: Plan) -> tuple[Work, ...]:
    """Return what each killed shard was working on: the first of its work that is still missing.

    It counts as an attempt, so that an adapter that kills every process it meets is parked.
    """
    return tuple(
        next(work for work in shard.work if work in plan.work)
        for shard in ended
        if shard.crashed and any(work in plan.work for work in shard.work)
    )
