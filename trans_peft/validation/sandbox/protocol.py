"""Messages between two processes that need not trust each other: a length, then JSON."""

import json
import struct
from typing import Any, Protocol

__all__ = ["MAX_MESSAGE_BYTES", "BadMessage", "Readable", "Stream", "Writable", "receive", "send"]

MAX_MESSAGE_BYTES = 8 << 20
_LENGTH = struct.Struct(">I")


class BadMessage(Exception):  # noqa: N818  a word about a message
    """A message that is not one: cut off, too long, or not JSON."""


class Readable(Protocol):
    """Where bytes come from."""

    def read(self, size: int, /) -> bytes:
        """Return so many bytes, or fewer at the end."""
        ...


class Writable(Protocol):
    """Where bytes go."""

    def write(self, data: bytes, /) -> object:
        """Take these bytes."""
        ...

    def flush(self) -> object:
        """Pass on what was taken."""
        ...


class Stream(Readable, Writable, Protocol):
    """Both, as a socket's file is."""


def send(stream: Writable, message: Any) -> None:
    """Write one message. BadMessage if it is too long; then nothing was written."""
    data = json.dumps(message).encode("ascii")
    if len(data) > MAX_MESSAGE_BYTES:
        raise BadMessage(f"a message of {len(data)} bytes; at most {MAX_MESSAGE_BYTES} travel")
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def receive(stream: Readable) -> Any:
    """Read one message. EOFError where the other side has ended; BadMessage."""
    head = stream.read(_LENGTH.size)
    if not head:
        raise EOFError("the other side has ended")
    length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else 0
    if not 0 < length <= MAX_MESSAGE_BYTES:
        raise BadMessage("a message that is cut off or too long")
    data = stream.read(length)
    if len(data) < length:
        raise BadMessage("a message that is cut off")
    try:
        return json.loads(data)
    except (ValueError, RecursionError, MemoryError) as error:
        raise BadMessage(f"a message that is not JSON: {type(error).__name__}") from None
