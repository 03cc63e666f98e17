"""When a task is tried again: what another attempt may mend, and nothing else."""

from typing import Any

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun

from trans_peft.errors import StoreError

__all__ = ["RETRIES"]


def _may_mend(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    try:
        state.result()
    except (StoreError, ConnectionError, TimeoutError):
        return True
    except BaseException:  # whatever else it is, the next attempt would meet it again
        return False
    return False


RETRIES: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": [2, 10, 30],
    "retry_condition_fn": _may_mend,
}
"""A service that did not answer is asked again; bad input, bad data and crashes are not."""
