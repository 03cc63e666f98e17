"""Calls to Prefect with a deadline, through a client that is replaced after a call was cut off.

Cancelling a request may leave its connection in httpx's pool for ever, counted as active
(https://github.com/encode/httpcore/issues/1093). Prefect's client has 16 connections. Once all of
them are lost this way, every later call waits for a free one and none succeeds. A client that had
a cancelled call therefore gets no new calls. It is closed when the calls that it still serves have
ended.
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
class _Open:
    context: AbstractAsyncContextManager[PrefectClient]
    client: PrefectClient
    calls: int = 0
    spent: bool = False


class PrefectCalls:
    """Makes calls to one Prefect server. `open_client`: makes a client that is not entered yet."""

    def __init__(
        self, open_client: Callable[[], AbstractAsyncContextManager[PrefectClient]]
    ) -> None:
        self._open_client = open_client
        self._current: _Open | None = None
        self._opening = asyncio.Lock()

    async def call(
        self, function: Callable[[PrefectClient], Awaitable[_Value]], *, patience_s: float
    ) -> _Value:
        """Return what `function` returns for a client. TimeoutError after `patience_s` seconds."""
        async with asyncio.timeout(patience_s):
            used = await self._usable()
            used.calls += 1
            try:
                return await function(used.client)
            except asyncio.CancelledError:
                used.spent = True
                raise
            finally:
                used.calls -= 1
                if used.spent and not used.calls:
                    _background(_close(used))

    async def close(self) -> None:
        """Close the current client."""
        used, self._current = self._current, None
        if used is not None:
            await _close(used)

    async def _usable(self) -> _Open:
        async with self._opening:
            if self._current is None or self._current.spent:
                context = self._open_client()
                self._current = _Open(context, await context.__aenter__())
            return self._current


_CLOSING: set[asyncio.Task[None]] = set()


def _background(closing: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(closing)
    _CLOSING.add(task)  # the event loop holds tasks by weak references only
    task.add_done_callback(_CLOSING.discard)


async def _close(used: _Open) -> None:
    with suppress(Exception):  # the pool may complain about the requests that were cut off
        async with asyncio.timeout(_CLOSING_S):
            await used.context.__aexit__(None, None, None)
