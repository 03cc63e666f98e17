"""Background loops that continue after an exception in one step, which they log and count."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn

import httpx
from prefect.exceptions import PrefectException

from infra.bridge.dispatcher import UnavailableError
from infra.bridge.logs import LOG
from infra.bridge.metrics import FailureSource, Metrics

__all__ = ["Failures", "run_forever"]

_MAX_PAUSE_S = 60.0
_MAX_REASON_CHARACTERS = 500
_UNAVAILABLE = (OSError, httpx.HTTPError, PrefectException, UnavailableError)


class Failures:
    """Logs and counts exceptions after which the bridge continues."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def record(self, source: FailureSource, error: BaseException, **fields: object) -> None:
        """Write one log line with these additional fields, and count one failure.

        The line has a traceback unless the error means that a server is not available.
        """
        self._metrics.failed(source)
        reason = f"{type(error).__name__}: {error}"[:_MAX_REASON_CHARACTERS]
        trace = None if isinstance(error, _UNAVAILABLE) else error
        LOG.warning("failed", exc_info=trace, extra={"place": source, "reason": reason, **fields})


async def run_forever(
    source: FailureSource,
    step: Callable[[], Awaitable[None]],
    *,
    interval_s: float,
    failures: Failures,
    retry_s: float | None = None,
) -> NoReturn:
    """Run a step again and again, `interval_s` seconds apart.

    An exception ends the step, not the loop. It is recorded, and the next step follows after
    `retry_s` seconds (default: `interval_s`), doubled with each failure in a row up to 60 s.
    """
    first_retry_s = interval_s if retry_s is None else retry_s
    failed = 0
    while True:
        try:
            await step()
            failed = 0
        except Exception as error:
            failures.record(source, error)
            failed += 1
        pause_s = first_retry_s * 2 ** min(failed - 1, 16) if failed else interval_s
        await asyncio.sleep(min(pause_s, max(_MAX_PAUSE_S, interval_s)))
