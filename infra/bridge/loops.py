"""Loops that never end: what fails in one step is logged and counted, and the next step follows."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn

import httpx
from prefect.exceptions import PrefectException

from infra.bridge.dispatcher import UnavailableError
from infra.bridge.logs import LOG
from infra.bridge.metrics import Metrics, Place

__all__ = ["Failures", "forever"]

_LONGEST_PAUSE_S = 60.0
_LONGEST_TEXT = 500
_AWAY = (OSError, httpx.HTTPError, PrefectException, UnavailableError)


class Failures:
    """Logs and counts the exceptions that the bridge survives."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def note(self, place: Place, error: BaseException, **fields: object) -> None:
        """Write one log line and count one failure. `fields` are added to the log line.

        The line has a traceback unless the error says that a server did not answer as it should.
        """
        self._metrics.failed(place)
        why = f"{type(error).__name__}: {error}"[:_LONGEST_TEXT]
        trace = None if isinstance(error, _AWAY) else error
        LOG.warning("failed", exc_info=trace, extra={"place": place, "why": why, **fields})


async def forever(
    place: Place,
    step: Callable[[], Awaitable[None]],
    *,
    every_s: float,
    failures: Failures,
    retry_s: float | None = None,
) -> NoReturn:
    """Run a step again and again, `every_s` seconds apart.

    An exception ends the step and not the loop. It is noted once, and the next step follows after
    `retry_s` seconds (`every_s` if not given), doubled with each failure in a row up to 60 s.
    """
    first_retry_s = every_s if retry_s is None else retry_s
    failed = 0
    while True:
        try:
            await step()
            failed = 0
        except Exception as error:
            failures.note(place, error)
            failed += 1
        pause_s = first_retry_s * 2 ** min(failed - 1, 16) if failed else every_s
        await asyncio.sleep(min(pause_s, max(_LONGEST_PAUSE_S, every_s)))
