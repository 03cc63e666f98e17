"""The fork server: imports modules once and forks a child process for each isolated call.

Starting Python and importing torch and transformers takes seconds. Forking a process that has
imported them takes milliseconds. The server is a plain subprocess and not multiprocessing's
forkserver, which imports the caller's main module again (a script without a main guard would run
twice) and unpickles what a child sends.

The server reads one message for each call from its control socket: one byte with three descriptors
(the call's socket, the status socket, a file for stderr). The header and the pickled call follow on
the call's socket. The child writes its reply there as JSON. The server reports on the status socket
that the child has started, and how it ended. The server ends with the process that started it.
"""

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass

from trans_peft.isolation.child import run

__all__ = ["LENGTH", "main", "receive_exactly"]

LENGTH = struct.Struct("!Q")
"""The format of the length that precedes each message."""

_PARENT_CHECK_S = 1.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class _Child:
    status: socket.socket
    deadline: float


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    """Return `size` bytes from a socket. EOFError if the other end closes it earlier."""
    received = bytearray()
    while len(received) < size:
        chunk = sock.recv(min(size - len(received), 1 << 20))
        if not chunk:
            raise EOFError("the other end closed the socket")
        received += chunk
    return bytes(received)


class _Server:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._parent = os.getppid()
        self._children: dict[int, _Child] = {}
        self._wakeup_reader, self._wakeup_writer = socket.socketpair()
        for end in (self._wakeup_reader, self._wakeup_writer):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)

    def serve(self) -> None:
        """Fork a child for each call until the parent process ends."""
        while os.getppid() == self._parent:
            watched = {child.status: pid for pid, child in self._children.items()}
            readable, _, _ = select.select(
                [self._control, self._wakeup_reader, *watched], [], [], self._timeout_s()
            )
            if self._wakeup_reader in readable:
                with suppress(BlockingIOError):
                    self._wakeup_reader.recv(4096)
            for status in readable:
                if status in watched:  # its caller has ended
                    _kill(watched[status])
            self._kill_overdue()
            self._reap()
            if self._control in readable and not self._accept():
                break
        for pid in self._children:
            _kill(pid)

    def _timeout_s(self) -> float:
        remaining = [child.deadline - time.monotonic() for child in self._children.values()]
        return max(0.0, min([_PARENT_CHECK_S, *remaining]))

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for pid, child in self._children.items():
            if now >= child.deadline:
                _report(child.status, {"limit": "wall"})
                _kill(pid)

    def _reap(self) -> None:
        for pid in list(self._children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                child = self._children.pop(pid)
                _report(child.status, {"code": os.waitstatus_to_exitcode(status)})
                child.status.close()

    def _accept(self) -> bool:
        message, fds, _, _ = socket.recv_fds(self._control, 1, 3)
        if not message:
            return False
        call, status = (socket.socket(fileno=fd) for fd in fds[:2])
        stderr = fds[2]
        try:
            header = json.loads(receive_exactly(call, *LENGTH.unpack(receive_exactly(call, 8))))
        except (EOFError, OSError):
            call.close()
            status.close()
            os.close(stderr)
            return True
        sys.path[:] = header["path"]
        for name in header["imports"]:
            with suppress(Exception):  # the child imports it too and reports the error
                importlib.import_module(name)
        server = os.getpid()
        gc.collect()
        gc.freeze()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads of numerical libraries
            pid = os.fork()
        if not pid:
            self._become_child(server, status)
            run(call, stderr, header)
        call.close()
        os.close(stderr)
        self._children[pid] = _Child(status, time.monotonic() + header["limits"]["wall_s"])
        _report(status, {"started": True})
        return True

    def _become_child(self, server: int, status: socket.socket) -> None:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for sock in (self._control, self._wakeup_reader, self._wakeup_writer, status):
            sock.close()
        for child in self._children.values():
            child.status.close()
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            os._exit(1)


def _kill(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _report(status: socket.socket, message: dict[str, object]) -> None:
    with suppress(OSError):  # the caller has ended
        status.sendall(json.dumps(message).encode() + b"\n")


def main(control: int) -> None:
    """Serve on the socket with this descriptor until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _Server(socket.socket(fileno=control)).serve()
