"""Calls to Prefect with a timeout, on a client that is replaced after a call was cancelled.

Cancelling a request may leave its connection in httpx's pool forever, counted as active
(https://github.com/encode/httpcore/issues/1093). Prefect's client has 16 connections. Once all of
them are lost this way, every later call waits for a free connection and fails. A client that had a
cancelled call therefore gets no new calls. It is closed when its remaining calls have ended.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from prefect.client.orchestration import PrefectClient

__all__ = ["PrefectCalls"]

_Value = TypeVar("_Value")
_CLOSING_S = 5.0


@dataclass
class _OpenClient:
    context: AbstractAsyncContextManager[PrefectClient]
    client: PrefectClient
    calls: int = 0
    is_retired: bool = False


class PrefectCalls:
    """Calls one Prefect server. `open_client` returns the context of a client, not entered yet."""

    def __init__(
        self, open_client: Callable[[], AbstractAsyncContextManager[PrefectClient]]
    ) -> None:
        self._open_client = open_client
        self._current: _OpenClient | None = None
        self._opening = asyncio.Lock()

    async def call(
        self, function: Callable[[PrefectClient], Awaitable[_Value]], *, timeout_s: float
    ) -> _Value:
        """Call `function` with a client and return its result. TimeoutError after `timeout_s`."""
        async with asyncio.timeout(timeout_s):
            used = await self._usable()
            used.calls += 1
            try:
                return await function(used.client)
            except asyncio.CancelledError:
                used.is_retired = True
                raise
            finally:
                used.calls -= 1
                if used.is_retired and not used.calls:
                    _close_in_background(_close(used))

    async def close(self) -> None:
        """Close the current client."""
        used, self._current = self._current, None
        if used is not None:
            await _close(used)

    async def _usable(self) -> _OpenClient:
        async with self._opening:
            if self._current is None or self._current.is_retired:
                context = self._open_client()
                self._current = _OpenClient(context, await context.__aenter__())
            return self._current


_CLOSING: set[asyncio.Task[None]] = set()


def _close_in_background(closing: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(closing)
    _CLOSING.add(task)  # the event loop holds tasks by weak references only
    task.add_done_callback(_CLOSING.discard)


async def _close(used: _OpenClient) -> None:
    with suppress(Exception):  # the pool may raise because of the cancelled requests
        async with asyncio.timeout(_CLOSING_S):
            await used.context.__aexit__(None, None, None)
