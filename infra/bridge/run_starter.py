"""Reconcile runs in Prefect: made for hints, or found waiting.

A run that has not started reads the registry later than this hint came, so it answers the hint too.
Not counted: a run planned for later (the schedule's), one with other parameters (somebody's dry
run), one that has been starting for so long that its worker is gone.

The idempotency key of a run is the delivery id, never (family, base): the champions A, B, A, B are
four hints and may be four runs. Many families that ask at once share one run for all families:
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

__all__ = ["PrefectStarter", "come_again_soon"]

_NOT_BEGUN = (StateType.SCHEDULED, StateType.PENDING)
_SOON = timedelta(seconds=1)
_STARTING = timedelta(seconds=60)
"""How long a run may take from being fetched by a worker to its first line."""

_MOST_RUNS = 4
"""More families than this at once share a run: each run is a process that starts for seconds."""


class PrefectStarter:
    """Starts runs of the deployment `reconcile/default`. `patience_s`: for one call, at most."""

    def __init__(self, prefect: PrefectCalls, *, patience_s: float = 20.0) -> None:
        self._prefect = prefect
        self._patience_s = patience_s

    async def start(self, wanted: Mapping[str | None, Notification]) -> Mapping[str | None, Run]:
        """Return a run for each family (None: all) that has read nothing yet. UnavailableError.

        Two reads, and at most `_MOST_RUNS` writes, one after another.
        """
        try:
            return await self._prefect.call(
                lambda client: self._start(client, wanted), patience_s=self._patience_s
            )
        except Exception as error:  # also an answer that cannot be read, such as a proxy's HTML
            raise UnavailableError(f"Prefect: {type(error).__name__}") from error

    async def reachable(self) -> bool:
        """Whether Prefect answers and knows the deployment."""
        try:
            await self._prefect.call(
                lambda client: client.read_deployment_by_name(Deployment.RECONCILE),
                patience_s=self._patience_s,
            )
        except Exception:
            return False
        return True

    async def _start(
        self, client: PrefectClient, wanted: Mapping[str | None, Notification]
    ) -> Mapping[str | None, Run]:
        deployment = await client.read_deployment_by_name(Deployment.RECONCILE)
        due = await _due(client, deployment)
        waiting = {family: _waiting(deployment, due, family) for family in wanted}
        found = {family: Run(str(run.id)) for family, run in waiting.items() if run is not None}
        left = {
            family: notification for family, notification in wanted.items() if family not in found
        }
        if None in left or len(left) > _MOST_RUNS:
            first = left.get(None) or next(iter(left.values()))
            made = await _make(client, deployment, None, first)
            return {**found, **dict.fromkeys(left, made)}
        for (
            family,
            notification,
        ) in left.items():  # at once they would lock one another out of SQLite
            found[family] = await _make(client, deployment, family, notification)
        return found


async def _make(
    client: PrefectClient,
    deployment: DeploymentResponse,
    family: str | None,
    notification: Notification,
) -> Run:
    origin = Origin(
        notification.delivery_id, notification.kind, notification.at or datetime.now(UTC)
    )
    made = await client.create_flow_run_from_deployment(
        deployment.id,
        parameters={"family": family},
        idempotency_key=f"hint-{notification.delivery_id}",
        tags=origin.tags,
    )
    # The key may be that of an earlier attempt, when fewer families asked.
    begun = made.state_type not in _NOT_BEGUN or made.parameters.get("family") != family
    return Run(str(made.id), notification.delivery_id, begun)


async def _due(client: PrefectClient, deployment: DeploymentResponse) -> list[FlowRun]:
    return await client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate(
            {
                "deployment_id": {"any_": [deployment.id]},
                "state": {"type": {"any_": _NOT_BEGUN}},
                "expected_start_time": {"before_": datetime.now(UTC) + _SOON},
            }
        ),
        sort=FlowRunSort.EXPECTED_START_TIME_ASC,
    )


async def come_again_soon(response: httpx.Response) -> None:
    """Have Prefect's client wait half a second where the server is busy, not 2, 4, 8 s.

    A hook for httpx. SQLite's lock, which the server answers with 503, is held for a moment.
    """
    if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        response.headers.setdefault("Retry-After", "0.5")


def _waiting(
    deployment: DeploymentResponse, due: list[FlowRun], family: str | None
) -> FlowRun | None:
    everyone: dict[str, Any] = {**deployment.parameters, "family": None}
    enough = (everyone, {**everyone, "family": family})
    return next((run for run in due if run.parameters in enough and _will_start(run)), None)


def _will_start(run: FlowRun) -> bool:
    state = run.state
    if state is None or state.type is StateType.SCHEDULED:
        return state is not None
    return datetime.now(UTC) - state.timestamp < _STARTING
