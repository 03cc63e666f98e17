"""A running interpreter that forks sandboxes, much faster than a new interpreter starts.

Each process that runs sandboxes has one server, started at first use with an environment of its
own. The server loads only the modules of the sandbox and runs no other code, so that every sandbox
starts from the same state. It ends with the process that started it, because the kernel then closes
their socket.
"""

import atexit
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from trans_peft.sandbox.root import SCRATCH

__all__ = ["LIBRARY", "ForkServer"]

LIBRARY = str(Path(__file__).parents[2])
"""The folder from which the server imports this package."""

_START = (
    f"import sys; sys.path.insert(0, {LIBRARY!r}); "
    "from trans_peft.sandbox.child import main; main({fd})"
)


class ForkServer:
    """Forks a sandbox for each `fork`. The server starts when it is needed and does not run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def fork(self, control: socket.socket, fds: Sequence[int]) -> None:
        """Start a sandbox that talks on `control`, with these descriptors for its job.

        If no sandbox could be started, the other end of `control` reads as closed.
        """
        with self._lock:
            alive = self._process is not None and self._owner == os.getpid()
            if not alive or self._process is None or self._process.poll() is not None:
                self._start()
            socket.send_fds(self._socket, [b"."], (control.fileno(), *fds))

    def _start(self) -> None:
        self._socket, child_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with child_socket:
            self._process = subprocess.Popen(
                # No site-packages (-S): a score must not depend on what else is installed.
                [sys.executable, "-BPSs", "-c", _START.format(fd=child_socket.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                cwd="/",
                pass_fds=(child_socket.fileno(),),
                start_new_session=True,
            )
        self._owner = os.getpid()
        atexit.register(self._stop, self._process, self._socket)

    @staticmethod
    def _stop(process: "subprocess.Popen[bytes]", server_socket: socket.socket) -> None:
        server_socket.close()
        process.kill()  # running sandboxes end with their own sockets
        process.wait()


def _environment() -> dict[str, str]:
    """Return an environment without the caller's variables, except the path of its libraries."""
    environment = {
        "HOME": SCRATCH,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",  # the same order of sets in every run
        "TMPDIR": SCRATCH,
    }
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return environment
