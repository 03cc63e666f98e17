"""A reconcile run in Prefect, started once for each delivery, or one that waits already.

The idempotency key is the delivery id, never (family, base): the champions A, B, A, B are four
hints and may be four runs. A run that has not started reads the registry later than this hint
came, so it answers the hint too. Not counted: a run planned for later (the schedule's), one with
other parameters (somebody's dry run), one that has been starting for so long that its worker is
gone.
"""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import PrefectException

from infra.bridge.desk import Run, Shared, UnavailableError

__all__ = ["DEPLOYMENT", "PrefectStarter"]

DEPLOYMENT = "reconcile/default"
_NOT_BEGUN = (StateType.SCHEDULED, StateType.PENDING)
_SOON = timedelta(seconds=1)
_STARTING = timedelta(seconds=60)
"""How long a run may take from being fetched by a worker to its first line."""


class PrefectStarter:
    """Starts runs of the deployment `reconcile/default`."""

    def __init__(self, client: PrefectClient) -> None:
        self._client = client
        # Ten writes at once lock one another out of SQLite, and each then waits for seconds.
        self._one_at_a_time = asyncio.Lock()
        self._looks: Shared[None, tuple[DeploymentResponse, list[FlowRun]]] = Shared()

    async def start(self, family: str | None, delivery_id: str) -> Run:
        """Return a run for the family (None: all) that has read nothing yet. UnavailableError."""
        try:
            (deployment, due), _ = await self._looks.call(None, self._look)
            waiting = _waiting(deployment, due, family)
            if waiting is not None:
                return Run(str(waiting.id), made=False)
            async with self._one_at_a_time:
                made = await self._client.create_flow_run_from_deployment(
                    deployment.id,
                    parameters={"family": family},
                    idempotency_key=f"hint-{delivery_id}",
                    tags=[f"hint:{delivery_id}"],
                )
            return Run(str(made.id), made=True, begun=made.state_type not in _NOT_BEGUN)
        except (httpx.HTTPError, PrefectException, OSError) as error:
            raise UnavailableError(f"Prefect: {type(error).__name__}") from error

    async def reachable(self) -> bool:
        """Whether Prefect answers and knows the deployment."""
        try:
            await self._client.read_deployment_by_name(DEPLOYMENT)
        except (httpx.HTTPError, PrefectException, OSError):
            return False
        return True

    async def _look(self) -> tuple[DeploymentResponse, list[FlowRun]]:
        """Return the deployment and its runs that are due; families that ask at once share it."""
        deployment = await self._client.read_deployment_by_name(DEPLOYMENT)
        due = await self._client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate(
                {
                    "deployment_id": {"any_": [deployment.id]},
                    "state": {"type": {"any_": _NOT_BEGUN}},
                    "expected_start_time": {"before_": datetime.now(UTC) + _SOON},
                }
            ),
            sort=FlowRunSort.EXPECTED_START_TIME_ASC,
        )
        return deployment, due


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
