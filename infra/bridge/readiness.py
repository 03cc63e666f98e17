"""Cached readiness probe behind `/ready`: all callers share one probe and its result."""

import asyncio
import time
from collections.abc import Awaitable, Callable

__all__ = ["Readiness"]


class Readiness:
    """Runs a probe at most once at a time and caches its result for `valid_s` seconds.

    `/ready` needs no authentication, so any number of clients may call it. A probe that takes
    longer than `timeout_s` seconds, or raises, means "not ready". A client that closes the
    connection does not cancel the probe.
    """

    def __init__(
        self,
        probe: Callable[[], Awaitable[bool]],
        *,
        valid_s: float = 2.0,
        timeout_s: float = 5.0,
    ) -> None:
        self._probe = probe
        self._valid_s = valid_s
        self._timeout_s = timeout_s
        self._task: asyncio.Task[bool] | None = None
        self._ended_at = 0.0

    async def now(self) -> bool:
        """Return the latest result, or wait for the probe that is running."""
        expired = time.monotonic() - self._ended_at > self._valid_s
        if self._task is None or (self._task.done() and expired):
            self._task = asyncio.create_task(self._run())
        return await asyncio.shield(self._task)

    async def _run(self) -> bool:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._probe()
        except Exception:
            return False
        finally:
            self._ended_at = time.monotonic()
