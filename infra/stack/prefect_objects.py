"""Creates the objects that a new Prefect server needs before the first deployment.

- The work pool, whose job template has no command (`job_template.py`). Its type is `kubernetes` if
  KUBERNETES_JOB_TEMPLATE names the folder of a template (infra/kubernetes), and else `process`.
- Its two queues. `control` (ingest, reconcile) has no limit. `gpu` (training, shards) runs as many
  flows at a time as there are GPU slots. A reconcile that waits for its shards therefore never
  occupies the places that the shards need. The worker itself has no limit, because one limit for
  both queues would deadlock as soon as that many reconciles wait.
- The GPU slots. `with concurrency("gpu")` holds one, in any queue and program.
- The automation for zombie flows (docs.prefect.io, "detect zombie flows"). It marks a run as
  crashed when its heartbeats stop. Until then the run occupies its place in the queue. A second one
  does so if a run does not start after a worker took it: such a run sends no heartbeats.

`up` runs this module as a program. Running it again updates only what differs.
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

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
from pydantic import Field, model_validator

from infra.stack.job_template import PROCESS_JOB_TEMPLATE, kubernetes_job_template
from tasks.environment import EnvironmentSettings
from trans_peft.domain.conventions import GPU_LIMIT, WORK_POOL

__all__ = [
    "QUEUES",
    "START_AUTOMATION",
    "ZOMBIE_AUTOMATION",
    "PoolSettings",
    "WorkQueueSettings",
    "register",
]


@dataclass(frozen=True)
class WorkQueueSettings:
    """A queue of the work pool.

    Priority 1 is the highest. If `is_limited`, as many flows run at a time as there are GPU slots.
    """

    priority: int
    is_limited: bool


QUEUES = {
    "control": WorkQueueSettings(1, is_limited=False),
    "gpu": WorkQueueSettings(2, is_limited=True),
}

_SILENCE_MINUTES = 3
_START_MINUTES = 15  # a pod may first have to wait for a node and its image


def _crash_unless(
    name: str, message: str, *, after: set[str], expect: set[str], minutes: int
) -> AutomationCore:
    """Return an automation that crashes a run if none of the expected events follows.

    Events are those of a flow run: `heartbeat`, or the name of a state. A final state is always
    expected.
    """
    ended = {"Completed", "Failed", "Cancelled", "Crashed"}
    return AutomationCore(
        name=name,
        description=f"Mark a flow run as crashed: {message}",
        trigger=EventTrigger(
            after={f"prefect.flow-run.{event}" for event in after},
            expect={f"prefect.flow-run.{event}" for event in expect | ended},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(minutes=minutes),
        ),
        actions=[
            ChangeFlowRunState(name=None, state=StateType.CRASHED, message=message, force=False)
        ],
    )


ZOMBIE_AUTOMATION = _crash_unless(
    "crash-zombie-flow-runs",
    f"The run sent no heartbeat for {_SILENCE_MINUTES} minutes. Its machine or process is gone.",
    after={"heartbeat", "Running"},
    expect={"heartbeat"},
    minutes=_SILENCE_MINUTES,
)
START_AUTOMATION = _crash_unless(
    "crash-flow-runs-that-do-not-start",
    f"A worker took the run, and it did not start within {_START_MINUTES} minutes. Its machine or "
    "process is gone.",
    after={"Pending", "Submitting"},
    expect={"Running", "Retrying", "Scheduled", "Late", "AwaitingConcurrencySlot", "AwaitingRetry"},
    minutes=_START_MINUTES,
)


class PoolSettings(EnvironmentSettings):
    """GPU slots, and the job template of a pool whose flow runs are Kubernetes Jobs."""

    gpu_slots: int = Field(default=1, ge=1, validation_alias="GPU_SLOTS")
    """GPUs of all workers together."""

    template_folder: Path | None = Field(default=None, validation_alias="KUBERNETES_JOB_TEMPLATE")
    """Folder with the template of a Kubernetes pool. None: a process pool, or the template that the
    operator gave to the Kubernetes pool."""

    worker_image: str = Field(default="", validation_alias="WORKER_IMAGE")
    """Image of the flow runs of a Kubernetes pool."""

    @model_validator(mode="after")
    def _image_is_known(self) -> "PoolSettings":
        if self.template_folder and not self.worker_image:
            raise ValueError("KUBERNETES_JOB_TEMPLATE is set, and WORKER_IMAGE is not")
        return self


async def register(
    client: PrefectClient, gpu_slots: int, kubernetes_template: dict[str, Any] | None = None
) -> None:
    """Create or update the pool, its queues, the GPU slots and the automations.

    With a `kubernetes_template`, the pool's type is `kubernetes`, and it gets this template.
    """
    kind = "process" if kubernetes_template is None else "kubernetes"
    template = kubernetes_template or PROCESS_JOB_TEMPLATE
    with suppress(ObjectAlreadyExists):
        pool = WorkPoolCreate(name=WORK_POOL, type=kind, base_job_template=template)
        await client.create_work_pool(pool)
    found_pool = await client.read_work_pool(WORK_POOL)
    if found_pool.type == kind and found_pool.base_job_template != template:
        await client.update_work_pool(WORK_POOL, WorkPoolUpdate(base_job_template=template))
    for name, queue in QUEUES.items():
        try:
            found = await client.read_work_queue_by_name(name, work_pool_name=WORK_POOL)
        except ObjectNotFound:
            found = await client.create_work_queue(name, work_pool_name=WORK_POOL)
        limit = gpu_slots if queue.is_limited else None
        await client.update_work_queue(found.id, priority=queue.priority, concurrency_limit=limit)
    await client.upsert_global_concurrency_limit_by_name(GPU_LIMIT, gpu_slots)
    await client.update_global_concurrency_limit(
        GPU_LIMIT, GlobalConcurrencyLimitUpdate(active=True)
    )
    for automation in (ZOMBIE_AUTOMATION, START_AUTOMATION):
        await _register_automation(client, automation)


async def _register_automation(client: PrefectClient, automation: AutomationCore) -> None:
    """Create or update an automation. An update discards the events that it has counted."""
    found = await client.read_automations_by_name(automation.name)
    if not found:
        await client.create_automation(automation)
    for one in found:
        if AutomationCore(**one.model_dump(exclude={"id"})) != automation:
            await client.update_automation(one.id, automation)


async def _main() -> None:
    settings = PoolSettings()
    folder = settings.template_folder
    template = kubernetes_job_template(folder, settings.worker_image) if folder else None
    async with get_client() as client:
        await register(client, settings.gpu_slots, template)


if __name__ == "__main__":
    asyncio.run(_main())
