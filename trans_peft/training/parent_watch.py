"""The child's side of the protocol: events, requests to stop, and an exit when the parent dies.

This module is imported before torch, so that a process ends with its parent even during imports.
"""

import os
import signal
import sys
import threading
from typing import TextIO

from trans_peft.training.events import EventMessage, encode

__all__ = ["EventStream", "exit_with_parent", "stop_requested"]

stop_requested = threading.Event()
"""Set when training has to save a checkpoint after the current step, and end."""


class EventStream:
    """Reserves stdout for events. Other output to stdout goes to stderr from then on."""

    def __init__(self) -> None:
        self._stream: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        sys.stdout.flush()
        os.dup2(2, 1)

    def send(self, message: EventMessage) -> None:
        """Write one message. Lines below 4 KiB do not mix with those of other processes."""
        self._stream.write(encode(message) + "\n")
        self._stream.flush()


def exit_with_parent() -> None:
    """Kill this process's group when stdin ends, that is, when the parent dies.

    The kernel closes the pipe however the parent ends, SIGKILL included. A byte in the pipe, and
    SIGTERM, set `stop_requested`.
    """

    def wait() -> None:
        while os.read(0, 1024):
            stop_requested.set()
        os.killpg(0, signal.SIGKILL)

    signal.signal(signal.SIGTERM, lambda *_: stop_requested.set())

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()
