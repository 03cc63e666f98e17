"""The child's side of the protocol: one stream for events, and a lifeline to the parent.

Imported before anything heavy, so that a process whose parent is gone ends even while it imports.
"""

import os
import signal
import sys
import threading
from typing import TextIO

from trans_peft.training.events import EventMessage, encode

__all__ = ["EventStream", "exit_with_parent"]


class EventStream:
    """Takes stdout for events alone; what anybody else prints there goes to stderr from now on."""

    def __init__(self) -> None:
        self._stream: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        sys.stdout.flush()
        os.dup2(2, 1)

    def send(self, message: EventMessage) -> None:
        """Send one message. Lines below 4 KiB never mix with those of another process."""
        self._stream.write(encode(message) + "\n")
        self._stream.flush()


def exit_with_parent() -> None:
    """Kill this process' whole group once stdin ends: the parent holds its other end until it dies.

    The kernel closes the pipe however the parent died, SIGKILL included.
    """

    def wait() -> None:
        while os.read(0, 1024):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
