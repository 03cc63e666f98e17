"""The answer of `/ready`: one probe at a time, whose result all callers share for a short while."""

import asyncio
import time
from collections.abc import Awaitable, Callable

__all__ = ["Readiness"]


class Readiness:
    """A cached probe.

    Anybody may call `/ready`, as often as they like. However many calls are open, at most one probe
    runs, and a result is used for `valid_s` seconds. A probe that takes longer than `patience_s`
    seconds, or raises, counts as "not ready". A caller that hangs up does not cancel the probe.
    """

    def __init__(
        self,
        probe: Callable[[], Awaitable[bool]],
        *,
        valid_s: float = 2.0,
        patience_s: float = 5.0,
    ) -> None:
        self._probe = probe
        self._valid_s = valid_s
        self._patience_s = patience_s
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
            async with asyncio.timeout(self._patience_s):
                return await self._probe()
        except Exception:
            return False
        finally:
            self._ended_at = time.monotonic()
