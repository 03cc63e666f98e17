"""Measures what waits and what runs in Prefect: queues, shards, workers, the last reconcile.

The bridge reads these numbers every 30 s, in about fifteen small requests, whatever the number of
runs. If Prefect does not answer, `trans_peft_prefect_up` is 0 and the other numbers are the last
ones that were read.
"""

from datetime import UTC, datetime
from math import inf
from typing import Any

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    FlowFilter,
    FlowRunFilter,
    WorkPoolFilter,
    WorkQueueFilter,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort

from infra.bridge.metrics import Metrics
from infra.bridge.prefect_calls import PrefectCalls
from trans_peft.domain.conventions import WORK_POOL, Deployment

__all__ = ["QUEUES", "PrefectMonitor"]

QUEUES = ("control", "gpu")
_STATES = {"waiting": ["SCHEDULED", "PENDING"], "running": ["RUNNING", "CANCELLING"]}
_ENDS = (StateType.COMPLETED, StateType.FAILED, StateType.CRASHED)
_TIMEOUT_S = 25.0
_POOL = WorkPoolFilter.model_validate({"name": {"any_": [WORK_POOL]}})


class PrefectMonitor:
    """Sets the gauges of Prefect's state. `timeout_s` limits one poll."""

    def __init__(
        self, prefect: PrefectCalls, metrics: Metrics, *, timeout_s: float = _TIMEOUT_S
    ) -> None:
        self._prefect = prefect
        self._metrics = metrics
        self._timeout_s = timeout_s

    async def poll(self) -> None:
        """Read everything once. Raises TimeoutError and the errors of Prefect's client."""
        try:
            await self._prefect.call(self._read, timeout_s=self._timeout_s)
        except Exception:
            self._metrics.prefect_up.set(0)
            raise
        self._metrics.prefect_up.set(1)

    async def _read(self, client: PrefectClient) -> None:
        now, metrics = datetime.now(UTC), self._metrics
        for queue in await client.read_work_queues(work_pool_name=WORK_POOL):
            if queue.name in QUEUES:
                metrics.queue_poll_age.labels(queue.name).set(_age_s(queue.last_polled, now))
        for name in QUEUES:
            of_queue: dict[str, Any] = {
                "work_pool_filter": _POOL,
                "work_queue_filter": _named(name),
            }
            for state in _STATES:
                count = await client.count_flow_runs(flow_run_filter=_runs(state, now), **of_queue)
                metrics.queue_runs.labels(name, state).set(count)
            oldest = await client.read_flow_runs(
                flow_run_filter=_runs("waiting", now),
                sort=FlowRunSort.EXPECTED_START_TIME_ASC,
                limit=1,
                **of_queue,
            )
            # A shard of a promotion is scheduled before it is created (tasks/shards.py).
            ages = [
                min(_age_s(run.expected_start_time, now), _age_s(run.created, now))
                for run in oldest
            ]
            metrics.queue_age.labels(name).set(max(ages, default=0.0))
        flow, deployment = _of(Deployment.TRANSFER_SHARD)
        for state in _STATES:
            count = await client.count_flow_runs(
                flow_filter=flow,
                deployment_filter=deployment,
                flow_run_filter=_runs(state, now),
            )
            metrics.shards.labels(state).set(count)
        workers = await client.read_workers_for_work_pool(WORK_POOL)
        metrics.workers.set(sum(worker.status == "ONLINE" for worker in workers))
        for end in _ENDS:
            newest = await _newest_reconcile(client, end)
            if newest is not None and newest.end_time is not None:
                metrics.reconcile_end.labels(end.lower()).set(newest.end_time.timestamp())


async def _newest_reconcile(client: PrefectClient, end: StateType) -> FlowRun | None:
    flow, deployment = _of(Deployment.RECONCILE)
    found = await client.read_flow_runs(
        flow_filter=flow,
        deployment_filter=deployment,
        flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": [end]}}}),
        sort=FlowRunSort.END_TIME_DESC,
        limit=1,
    )
    return found[0] if found else None


def _of(deployment: Deployment) -> tuple[FlowFilter, DeploymentFilter]:
    flow, _, name = deployment.partition("/")
    return (
        FlowFilter.model_validate({"name": {"any_": [flow]}}),
        DeploymentFilter.model_validate({"name": {"any_": [name]}}),
    )


def _named(queue: str) -> WorkQueueFilter:
    return WorkQueueFilter.model_validate({"name": {"any_": [queue]}})


def _runs(state: str, now: datetime) -> FlowRunFilter:
    """Runs that wait or run. Runs that are scheduled for later do not wait."""
    fields: dict[str, Any] = {"state": {"type": {"any_": _STATES[state]}}}
    if state == "waiting":
        fields["expected_start_time"] = {"before_": now}
    return FlowRunFilter.model_validate(fields)


def _age_s(at: datetime | None, now: datetime) -> float:
    return inf if at is None else max(0.0, (now - at).total_seconds())
