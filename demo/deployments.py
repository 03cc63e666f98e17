"""Start a Prefect deployment on the worker, and show its log lines until the run has ended.

Each run has an idempotency key. A second demo follows the run that the first one started, and
starts another one only if that run has ended. A run that crashed, for example because its worker
was killed, is started again. A run that failed ends the demo.
"""

import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from itertools import count
from typing import Any, cast
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    LogFilter,
    LogFilterFlowRunId,
    LogFilterLevel,
    LogFilterTimestamp,
)
from prefect.client.schemas.objects import FlowRun, Log, StateType
from prefect.client.schemas.sorting import LogSort
from prefect.deployments import run_deployment
from pydantic_core import to_jsonable_python

from demo.screen import DemoError, Screen, servers_gone
from trans_peft.domain.conventions import Deployment

__all__ = ["run", "set_parameters"]

_POLL_S = 1.0
_MAX_SILENCE_S = 30.0
_MAX_CRASHES = 3
_LATE = timedelta(seconds=10)  # each run sends its log lines every few seconds
_INFO = 20
_NOISE = (
    "All deployment steps",
    "Beginning",
    "Created task run",
    "Deployment step",
    "Executing deployment",
    "Finished in state",
    "Running 1 deployment",
)
_MACHINERY = ("prefect.flow_runs.worker", "prefect.flow_runs.runner", "prefect.task_runs.engine")


def run(deployment: str, parameters: Mapping[str, Any], *, key: str, screen: Screen) -> None:
    """Run a deployment to its end. DemoError if it fails, or crashes too often."""
    crashes = 0
    for attempt in count():
        flow_run = cast(
            FlowRun,
            run_deployment(
                deployment,
                parameters=dict(parameters),
                idempotency_key=f"demo/{key}/{attempt}",
                timeout=0,
                as_subflow=False,
            ),
        )
        if flow_run.state is not None and flow_run.state.is_final():
            continue  # of an earlier demo
        screen.line(f"{deployment}: flow run {flow_run.name}", "dim")
        ended = _follow(flow_run.id, deployment, screen)
        state = ended.state
        if state is not None and state.is_completed():
            return
        message = state.message if state else ""
        text = f"{deployment} ({ended.name}) ended as {ended.state_name}: {message}"
        if state is None or not state.is_crashed() or crashes == _MAX_CRASHES:
            raise DemoError(
                text, do="read the log on the run's page in Prefect; `make demo` resumes"
            )
        crashes += 1
        screen.line(f"{text}. It is started again.", "yellow")


def set_parameters(deployment: str, parameters: Mapping[str, Any]) -> None:
    """Set parameters of a deployment, for the runs that others start as well."""
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name(deployment)
        values = {**found.parameters, **to_jsonable_python(parameters)}
        client.update_deployment(found.id, DeploymentUpdate(parameters=values))


def _follow(run_id: UUID, deployment: str, screen: Screen) -> FlowRun:
    with get_client(sync_client=True) as client:
        logs = _Logs(client, run_id)
        shown, started = "", time.monotonic()
        responded = started
        while True:
            try:
                flow_run, new = client.read_flow_run(run_id), logs.new()
                responded = time.monotonic()
            except httpx.TransportError as error:  # a restart takes seconds
                if time.monotonic() - responded > _MAX_SILENCE_S:
                    raise servers_gone(error) from error
                screen.heartbeat("Prefect does not respond")
                time.sleep(_POLL_S)
                continue
            for log in new:
                screen.line(log.message, "" if log.level == _INFO else "yellow")
            if flow_run.state_name != shown:
                shown = flow_run.state_name or ""
                screen.line(f"{deployment}: {shown.lower()}", "dim")
            if flow_run.state is not None and flow_run.state.is_final():
                with suppress(httpx.TransportError):
                    for log in logs.new():
                        screen.line(log.message)
                return flow_run
            waited_s = time.monotonic() - started
            stuck = flow_run.state is not None and flow_run.state.is_scheduled() and waited_s > 60
            advice = "; if it does not start: make status shows the worker" if stuck else ""
            screen.heartbeat(f"{deployment}: {shown.lower()}, {waited_s:.0f} s{advice}")
            time.sleep(_POLL_S)


class _Logs:
    """Reads the new log lines of a flow run, of the runs that it started, and of running shards.

    A reconcile run also waits for shards that another one started.
    """

    def __init__(self, client: SyncPrefectClient, run_id: UUID) -> None:
        self._client = client
        self._shards = client.read_deployment_by_name(Deployment.TRANSFER_SHARD).id
        self._run_id = run_id
        self._runs = {run_id}
        self._seen: set[UUID] = set()
        self._since: datetime | None = None

    def new(self) -> list[Log]:
        children = self._client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[self._run_id])
            )
        )
        shards = self._client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[self._shards])),
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING]))
            ),
        )
        self._runs.update(run.id for run in (*children, *shards))
        found = self._client.read_logs(
            LogFilter(
                flow_run_id=LogFilterFlowRunId(any_=sorted(self._runs)),
                level=LogFilterLevel(ge_=_INFO),
                timestamp=LogFilterTimestamp(after_=cast(Any, self._since)),
            ),
            sort=LogSort.TIMESTAMP_ASC,
        )
        fresh = [log for log in found if log.id not in self._seen]
        self._seen.update(log.id for log in fresh)
        if found:
            self._since = found[-1].timestamp - _LATE
        return [
            log
            for log in fresh
            if log.name not in _MACHINERY and not log.message.startswith(_NOISE)
        ]
