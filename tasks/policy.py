"""When a task is tried again, and whom its failure is about."""

from typing import Any

import httpx
from prefect import Task
from prefect.client.schemas.objects import State, TaskRun
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError

from trans_peft.errors import AccessError, BaseUnreadableError, IsolationError, StoreError

__all__ = ["RETRIES", "is_infrastructure_failure"]


_NO_ANSWER = (
    StoreError,
    IsolationError,
    ConnectionError,
    TimeoutError,
    ConcurrencySlotAcquisitionError,
    httpx.TransportError,
)


def is_infrastructure_failure(state: State[Any]) -> bool:
    """Whether a task failed for want of a service, a disk or a right.

    That says nothing about what it worked on: no attempt is charged, and the next reconcile starts
    it again.
    """
    error = _error(state)
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.is_server_error
    return isinstance(error, _NO_ANSWER)


def _may_mend(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether another attempt within a minute can succeed: not if access or a base is missing."""
    lasting = isinstance(_error(state), AccessError | BaseUnreadableError)
    return is_infrastructure_failure(state) and not lasting


def _error(state: State[Any]) -> BaseException | None:
    try:
        state.result()
    except BaseException as error:
        return error
    return None


RETRIES: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": [2, 10, 30],
    "retry_condition_fn": _may_mend,
}
"""A service that did not answer is asked again; bad input, bad data and crashes are not."""
