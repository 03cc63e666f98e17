"""HTTP/1.1 with a size limit for the head of a request and a deadline for a client that stalls.

uvicorn has no such deadlines. Without them, a client could keep a connection open for as long as it
likes: with a head that arrives one byte at a time, with a body that arrives after the response, or
by not reading responses. Once all connections were taken, every other client would receive 503.
"""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["HEAD_DEADLINE_S", "MAX_HEAD_BYTES", "DeadlineProtocol"]

HEAD_DEADLINE_S = 10.0
MAX_HEAD_BYTES = 16 << 10


class DeadlineProtocol(H11Protocol):
    """uvicorn's protocol, with a deadline whenever the connection waits for its client.

    The connection waits for its client until the head of a request is complete, after a response
    (for the rest of the body and the next head), and while the client does not read. The deadline
    drops responses that the client has not read. The application limits the time for a body that
    it reads.
    """

    _deadline: asyncio.TimerHandle | None = None
    _writing_paused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock for the first request."""
        super().connection_made(transport)
        self._update_clock()

    def data_received(self, data: bytes) -> None:
        """Start the clock at the first byte of a head; stop it once the head is complete."""
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self._stop_clock()
        super().data_received(data)
        self._update_clock()

    def on_response_complete(self) -> None:
        """Start the clock for what the client has yet to send."""
        super().on_response_complete()
        self._update_clock()

    def pause_writing(self) -> None:
        """Start the clock for a client that does not read."""
        super().pause_writing()
        self._writing_paused = True
        self._update_clock()

    def resume_writing(self) -> None:
        """Stop the clock once the client reads again."""
        super().resume_writing()
        self._writing_paused = False
        self._update_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_clock()
        super().connection_lost(exc)

    def _update_clock(self) -> None:
        responding = self.cycle is not None and not self.cycle.response_complete
        if responding and not self._writing_paused:
            self._stop_clock()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_DEADLINE_S, self.transport.abort)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
