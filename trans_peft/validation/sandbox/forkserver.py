"""A warm interpreter that forks sandboxes: a fork costs a fraction of a Python that starts.

One for each process that checks code, started at first use with an environment of its own. It holds
nothing but the sandbox's modules and runs no code but theirs, so that each sandbox is as fresh as
the first. It ends when this process does: the kernel closes their socket.
"""

import atexit
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from trans_peft.validation.sandbox.root import SCRATCH

__all__ = ["LIBRARY", "ForkServer"]

LIBRARY = str(Path(__file__).parents[3])
_START = (
    f"import sys; sys.path.insert(0, {LIBRARY!r}); "
    "from trans_peft.validation.sandbox.child import main; main({fd})"
)


class ForkServer:
    """Forks a sandbox for each `fork`; starts, and starts again, where there is none to do it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def fork(self, line: socket.socket, fds: Sequence[int]) -> None:
        """Start a sandbox at the other end of `line`, with these descriptors for its job.

        It is heard of on that line alone: where nothing could be started, the line ends.
        """
        with self._lock:
            alive = self._process is not None and self._owner == os.getpid()
            if not alive or self._process is None or self._process.poll() is not None:
                self._start()
            socket.send_fds(self._socket, [b"."], (line.fileno(), *fds))

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                # No site-packages (-S): a score must not hang on what else is installed.
                [sys.executable, "-BPSs", "-c", _START.format(fd=theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                cwd="/",
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self._owner = os.getpid()
        atexit.register(self._stop, self._process, self._socket)

    @staticmethod
    def _stop(process: "subprocess.Popen[bytes]", line: socket.socket) -> None:
        line.close()
        process.kill()  # sandboxes that are left end by their own lines
        process.wait()


def _environment() -> dict[str, str]:
    """Nothing of the caller's, but where its interpreter finds its own libraries."""
    environment = {
        "HOME": SCRATCH,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",  # the order of a set is to be the same in every run
        "TMPDIR": SCRATCH,
    }
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return environment
