"""Messages between two processes that do not trust each other: a length, then JSON."""

import json
import struct
from typing import Any, Protocol

__all__ = [
    "MAX_MESSAGE_BYTES",
    "InvalidMessageError",
    "Readable",
    "Stream",
    "Writable",
    "receive",
    "send",
]

MAX_MESSAGE_BYTES = 8 << 20
_LENGTH = struct.Struct(">I")


class InvalidMessageError(Exception):
    """A message that is truncated, too long, or not JSON."""


class Readable(Protocol):
    """A binary stream that can be read."""

    def read(self, size: int, /) -> bytes:
        """Return `size` bytes, or fewer at the end of the stream."""
        ...


class Writable(Protocol):
    """A binary stream that can be written."""

    def write(self, data: bytes, /) -> object:
        """Write the bytes to a buffer."""
        ...

    def flush(self) -> object:
        """Write the buffer to the other process."""
        ...


class Stream(Readable, Writable, Protocol):
    """A binary stream that can be read and written, such as a socket's file object."""


def send(stream: Writable, message: Any) -> None:
    """Write one message. InvalidMessageError if it is too long; then nothing was written."""
    data = json.dumps(message).encode("ascii")
    if len(data) > MAX_MESSAGE_BYTES:
        raise InvalidMessageError(
            f"the message has {len(data)} bytes, more than the limit of {MAX_MESSAGE_BYTES}"
        )
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def receive(stream: Readable) -> Any:
    """Read one message. EOFError at the end of the stream; InvalidMessageError."""
    head = stream.read(_LENGTH.size)
    if not head:
        raise EOFError("the other process closed the stream")
    length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else 0
    if not 0 < length <= MAX_MESSAGE_BYTES:
        raise InvalidMessageError("the message is truncated or too long")
    data = stream.read(length)
    if len(data) < length:
        raise InvalidMessageError("the message is truncated")
    try:
        return json.loads(data)
    except (ValueError, RecursionError, MemoryError) as error:
        raise InvalidMessageError(f"the message is not JSON: {type(error).__name__}") from None
