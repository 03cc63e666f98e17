"""Retries of tasks, and which failures count as attempts of an adapter."""

from typing import Any

import httpx
from prefect import Task
from prefect.client.schemas.objects import State, TaskRun
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError

from trans_peft.errors import (
    AccessError,
    BaseUnreadableError,
    IsolationError,
    StoreError,
    WorkerError,
)

__all__ = ["RETRIES", "is_infrastructure_failure"]


_INFRASTRUCTURE = (
    StoreError,
    IsolationError,
    WorkerError,
    ConnectionError,
    TimeoutError,
    ConcurrencySlotAcquisitionError,
    httpx.TransportError,
)


def is_infrastructure_failure(state: State[Any]) -> bool:
    """Whether a task failed because of a service, a worker, an access right or a base version.

    Such a failure does not count as an attempt of the adapter. The next reconcile starts the task
    again.
    """
    error = _error(state)
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.is_server_error
    return isinstance(error, _INFRASTRUCTURE)


def _is_worth_a_retry(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether another attempt within a minute can succeed.

    It cannot if access is denied, a base version cannot be read or this worker is unfit: a person
    has to act first.
    """
    lasting = isinstance(_error(state), AccessError | BaseUnreadableError | WorkerError)
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
    "retry_condition_fn": _is_worth_a_retry,
}
"""Options of a task that is retried if a service did not respond, and not for other errors."""
