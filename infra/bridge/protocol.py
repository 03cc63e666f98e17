"""HTTP/1.1 with a bound and a deadline for the head of a request.

uvicorn bounds neither the time nor, without h11, the size. A client that sends its headers one byte
at a time would hold one of the bridge's connections for as long as it likes.
"""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["HEAD_DEADLINE_S", "MAX_HEAD_BYTES", "DeadlineProtocol"]

HEAD_DEADLINE_S = 10.0
MAX_HEAD_BYTES = 16 << 10


class DeadlineProtocol(H11Protocol):
    """uvicorn's protocol. Closes a connection whose next request has no complete head in time."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock for the first request."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Start the clock for a later request, or stop it once the head is complete."""
        super().data_received(data)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_clock()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_clock()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_DEADLINE_S, self.transport.close)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
