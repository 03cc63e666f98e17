"""HTTP/1.1 with a size limit for headers and a deadline for a client that stalls.

uvicorn has no such deadline. Without it, a client could keep a connection open indefinitely: by
sending its headers one byte at a time, by sending a body after the response, or by not reading
responses. Once all connections were in use, every other client would receive 503.
"""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["CLIENT_DEADLINE_S", "MAX_HEADERS_BYTES", "DeadlineProtocol"]

CLIENT_DEADLINE_S = 10.0
MAX_HEADERS_BYTES = 16 << 10


class DeadlineProtocol(H11Protocol):
    """uvicorn's protocol, with a deadline whenever the connection waits for its client.

    The connection waits for its client until the headers of a request are complete, after a
    response (for the rest of the body and the next headers), and while the client does not read.
    The deadline drops responses that the client has not read. The application limits the time for a
    body that it reads.
    """

    _timer: asyncio.TimerHandle | None = None
    _writing_paused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer for the first request."""
        super().connection_made(transport)
        self._update_timer()

    def data_received(self, data: bytes) -> None:
        """Start the timer at the first byte of a request, stop it once the headers are complete."""
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self._stop_timer()
        super().data_received(data)
        self._update_timer()

    def on_response_complete(self) -> None:
        """Start the timer for the rest of the body and the next request."""
        super().on_response_complete()
        self._update_timer()

    def pause_writing(self) -> None:
        """Start the timer for a client that does not read."""
        super().pause_writing()
        self._writing_paused = True
        self._update_timer()

    def resume_writing(self) -> None:
        """Stop the timer once the client reads again."""
        super().resume_writing()
        self._writing_paused = False
        self._update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def _update_timer(self) -> None:
        responding = self.cycle is not None and not self.cycle.response_complete
        if responding and not self._writing_paused:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(CLIENT_DEADLINE_S, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
