"""Whether a worker serves the work queue in which a flow run waits.

Prefect's server marks a queue as not ready when no worker has polled it for a minute. Its clock
decides, so the clocks of workers and of this process do not matter.
"""

import time
from collections.abc import Callable, Sequence

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, WorkQueueStatus
from prefect.exceptions import ObjectNotFound

__all__ = ["UNSERVED_AFTER_S", "QueueWatch", "unserved"]

UNSERVED_AFTER_S = 60.0
"""A run waits this long before its queue is checked: a worker may be starting."""

_EVERY_S = 15.0
_REGISTER = "create it: `python -m infra.stack.prefect_objects`"


def unserved(waiting: Sequence[FlowRun], client: SyncPrefectClient) -> str:
    """Return why waiting runs cannot start, by the queue of the first one; empty if they can."""
    if not waiting:
        return ""
    name, pool = waiting[0].work_queue_name, waiting[0].work_pool_name
    if name is None or pool is None:
        return ""
    try:
        queue = client.read_work_queue_by_name(name, work_pool_name=pool)
    except ObjectNotFound:
        return _text(name, pool, len(waiting), "there is no such queue", _REGISTER)
    match queue.status:
        case WorkQueueStatus.NOT_READY:
            last = queue.last_polled
            found = (
                "no worker has ever polled it"
                if last is None
                else f"the last poll was at {last:%Y-%m-%d %H:%M:%S} UTC"
            )
            do = (
                f"start a worker (`prefect worker start --pool {pool}`), or read the log of the "
                "one that should run"
            )
        case WorkQueueStatus.PAUSED:
            found, do = "the queue is paused", "resume it on Prefect's page of the work pool"
        case _:
            return ""
    return _text(name, pool, len(waiting), found, do)


def _text(name: str, pool: str, waiting: int, found: str, do: str) -> str:
    return (
        f"no worker serves the queue {name} of the work pool {pool}, and flow runs wait in it\n"
        "  expected: a worker that polls the queue\n"
        f"  found:    {found}; runs that wait: {waiting}\n"
        f"  do:       {do}"
    )


class QueueWatch:
    """Reports once that runs have waited for a minute in a queue without a worker, and its end.

    `on_change` is called with the text of `unserved`, and with an empty text when a worker serves
    the queue again.
    """

    def __init__(
        self, on_change: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._on_change = on_change
        self._clock = clock
        self._next_s = clock() + UNSERVED_AFTER_S
        self._is_reported = False

    def check(self, waiting: Sequence[FlowRun], client: SyncPrefectClient) -> None:
        """Check the queue of the waiting runs, at most every 15 s."""
        if self._clock() < self._next_s:
            return
        self._next_s = self._clock() + _EVERY_S
        text = unserved(waiting, client)
        if bool(text) != self._is_reported:
            self._is_reported = bool(text)
            self._on_change(text)
