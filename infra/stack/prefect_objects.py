"""What a fresh Prefect server needs before the first deployment; run as a program by `up`.

- The work pool, for whose runs nobody chooses a command (`job_template.py`).
- Its two queues. `control` (ingest, reconcile) is not limited; `gpu` (training, shards) runs as
  many flows at a time as there are GPU slots. A reconcile that waits for its shards therefore never
  holds what its shards wait for. The worker itself has no limit: one limit over both queues would
  deadlock as soon as that many reconciles wait.
- The GPU slots: `with concurrency("gpu")` holds one, whichever queue or program the work is from.
- The zombie automation (docs.prefect.io, "detect zombie flows"): a run whose machine went away
  without a word is marked crashed when its heartbeat stops. Until then it holds its place in the
  queue.

Doing it again changes what differs and nothing else.
"""

import asyncio
import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import (
    GlobalConcurrencyLimitUpdate,
    WorkPoolCreate,
    WorkPoolUpdate,
)
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from infra.stack.job_template import PROCESS_JOB_TEMPLATE
from infra.stack.settings import StackSettings
from trans_peft.domain.conventions import GPU_LIMIT, WORK_POOL

__all__ = ["QUEUES", "ZOMBIES", "Queue", "register"]


@dataclass(frozen=True)
class Queue:
    """A queue of the work pool: its priority (1 is first), and whether GPU slots limit it."""

    priority: int
    limited: bool


QUEUES = {"control": Queue(1, limited=False), "gpu": Queue(2, limited=True)}

_HEARTBEAT = "prefect.flow-run.heartbeat"
ZOMBIES = AutomationCore(
    name="crash-zombie-flow-runs",
    description="A flow run that sent no heartbeat for 3 minutes has crashed",
    trigger=EventTrigger(
        after={_HEARTBEAT},
        expect={
            _HEARTBEAT,
            *(f"prefect.flow-run.{s}" for s in ("Completed", "Failed", "Cancelled", "Crashed")),
        },
        match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(minutes=3),
    ),
    actions=[
        ChangeFlowRunState(
            name=None,
            state=StateType.CRASHED,
            message="No heartbeat for 3 minutes: the machine is gone.",
            force=False,
        )
    ],
)


async def register(client: PrefectClient, gpu_slots: int) -> None:
    """Create or update the pool, its queues, the GPU slots and the automation."""
    template = PROCESS_JOB_TEMPLATE
    with suppress(ObjectAlreadyExists):
        pool = WorkPoolCreate(name=WORK_POOL, type="process", base_job_template=template)
        await client.create_work_pool(pool)
    found_pool = await client.read_work_pool(WORK_POOL)
    # The template of a pool of Kubernetes is the operator's: infra/kubernetes.
    if found_pool.type == "process" and found_pool.base_job_template != template:
        await client.update_work_pool(WORK_POOL, WorkPoolUpdate(base_job_template=template))
    for name, queue in QUEUES.items():
        try:
            found = await client.read_work_queue_by_name(name, work_pool_name=WORK_POOL)
        except ObjectNotFound:
            found = await client.create_work_queue(name, work_pool_name=WORK_POOL)
        limit = gpu_slots if queue.limited else None
        await client.update_work_queue(found.id, priority=queue.priority, concurrency_limit=limit)
    await client.upsert_global_concurrency_limit_by_name(GPU_LIMIT, gpu_slots)
    await client.update_global_concurrency_limit(
        GPU_LIMIT, GlobalConcurrencyLimitUpdate(active=True)
    )
    if not await client.read_automations_by_name(ZOMBIES.name):
        await client.create_automation(ZOMBIES)


async def _main() -> None:
    settings = StackSettings.from_environment(os.environ)
    async with get_client() as client:
        await register(client, settings.gpu_slots)


if __name__ == "__main__":
    asyncio.run(_main())
