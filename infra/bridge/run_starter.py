"""Finds reconcile runs in Prefect that have not begun, and creates the missing ones.

A run that has not begun will read the registry later than the notification arrived, so it covers
the notification. Runs that do not count: those scheduled for later, those with other parameters
(such as a dry run), and those that have been starting for so long that their worker must be gone.

The idempotency key of a run is the delivery id, not the family and base: a `champion` that moves
from A to B and back to A and B causes four notifications and may cause four runs. If many families
are requested at once, one run covers all families:
docs/decisions/0099-bursts-share-calls-and-runs.md.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort

from infra.bridge.dispatcher import Run, UnavailableError
from infra.bridge.notifications import Notification
from infra.bridge.prefect_calls import PrefectCalls
from tasks.origin import Origin
from trans_peft.domain.conventions import Deployment

__all__ = ["PrefectRunStarter", "shorten_retry_after"]

_NOT_BEGUN = (StateType.SCHEDULED, StateType.PENDING)
_DUE_WITHIN = timedelta(seconds=1)
_START_TIMEOUT = timedelta(seconds=60)
"""Longest time from a worker's fetching a run to the first line of its flow."""

_MAX_RUNS = 4
"""If more families are requested at once, they share a run: each run starts a process, which takes
seconds."""


class PrefectRunStarter:
    """Starts runs of the deployment `reconcile/default`. `timeout_s` limits each call."""

    def __init__(self, prefect: PrefectCalls, *, timeout_s: float = 20.0) -> None:
        self._prefect = prefect
        self._timeout_s = timeout_s

    async def start(self, requested: Mapping[str | None, Notification]) -> Mapping[str | None, Run]:
        """Return a run for each family (None: all families) that has not read the registry yet.

        Makes two reads, and at most `_MAX_RUNS` writes one after another. UnavailableError.
        """
        try:
            return await self._prefect.call(
                lambda client: self._start(client, requested), timeout_s=self._timeout_s
            )
        except Exception as error:  # also a response that cannot be read, such as a proxy's HTML
            raise UnavailableError.because("Prefect", error) from error

    async def is_reachable(self) -> bool:
        """Whether Prefect answers and the deployment exists."""
        try:
            await self._prefect.call(
                lambda client: client.read_deployment_by_name(Deployment.RECONCILE),
                timeout_s=self._timeout_s,
            )
        except Exception:
            return False
        return True

    async def _start(
        self, client: PrefectClient, requested: Mapping[str | None, Notification]
    ) -> Mapping[str | None, Run]:
        deployment = await client.read_deployment_by_name(Deployment.RECONCILE)
        due = await _due_runs(client, deployment)
        waiting = {family: _waiting_run(deployment, due, family) for family in requested}
        runs = {family: Run(str(run.id)) for family, run in waiting.items() if run is not None}
        missing = {family: found for family, found in requested.items() if family not in runs}
        if None in missing or len(missing) > _MAX_RUNS:
            first = missing.get(None) or next(iter(missing.values()))
            shared = await _create_run(client, deployment, None, first)
            return {**runs, **dict.fromkeys(missing, shared)}
        # One after another: concurrent writes would lock each other out of SQLite.
        for family, notification in missing.items():
            runs[family] = await _create_run(client, deployment, family, notification)
        return runs


async def _create_run(
    client: PrefectClient,
    deployment: DeploymentResponse,
    family: str | None,
    notification: Notification,
) -> Run:
    at = notification.at or datetime.now(UTC)
    origin = Origin(notification.delivery_id, notification.kind, at)
    created = await client.create_flow_run_from_deployment(
        deployment.id,
        parameters={"family": family},
        idempotency_key=f"notification-{notification.delivery_id}",
        tags=origin.tags,
    )
    # An earlier attempt of this delivery, among fewer families, may have used the key already.
    begun = created.state_type not in _NOT_BEGUN or created.parameters.get("family") != family
    return Run(str(created.id), notification.delivery_id, begun)


async def _due_runs(client: PrefectClient, deployment: DeploymentResponse) -> list[FlowRun]:
    return await client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate(
            {
                "deployment_id": {"any_": [deployment.id]},
                "state": {"type": {"any_": _NOT_BEGUN}},
                "expected_start_time": {"before_": datetime.now(UTC) + _DUE_WITHIN},
            }
        ),
        sort=FlowRunSort.EXPECTED_START_TIME_ASC,
    )


async def shorten_retry_after(response: httpx.Response) -> None:
    """Let Prefect's client retry a busy server after 0.5 s instead of 2, 4 and 8 s.

    A response hook for httpx. The server answers 503 while SQLite is locked, which is brief.
    """
    if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        response.headers.setdefault("Retry-After", "0.5")


def _waiting_run(
    deployment: DeploymentResponse, due: list[FlowRun], family: str | None
) -> FlowRun | None:
    """Return the first run that will begin and that covers the family."""
    of_all: dict[str, Any] = {**deployment.parameters, "family": None}
    covering = (of_all, {**of_all, "family": family})
    return next((run for run in due if run.parameters in covering and _will_begin(run)), None)


def _will_begin(run: FlowRun) -> bool:
    state = run.state
    if state is None or state.type is StateType.SCHEDULED:
        return state is not None
    return datetime.now(UTC) - state.timestamp < _START_TIMEOUT
