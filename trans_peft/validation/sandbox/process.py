"""One sandbox, from outside: start it, hold it to its guards, end it with all its children.

Why not the `unshare` program, bubblewrap or nsjail: workers that evaluate adapters run in
containers, where none of them need be installed, and each lacks a part (limits, a filter of system
calls, a wall clock, a private root). What is needed is eight system calls, in `kernel`.

This process only writes the id maps of the sandbox, which a process outside has to, sends it an
order and hears how it ended. It trusts nothing that generated code says to be more than bytes.
"""

import json
import os
import signal
import socket
from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from trans_peft.errors import EvaluationError
from trans_peft.validation.sandbox.child import NOBODY
from trans_peft.validation.sandbox.forkserver import LIBRARY, ForkServer
from trans_peft.validation.sandbox.guards import Guard, refuse
from trans_peft.validation.sandbox.limits import Limits
from trans_peft.validation.sandbox.root import python_paths

__all__ = ["ProcessExit", "Sandbox"]

_NURSERY = ForkServer()
_PATIENCE_S = 10
# The kernel limits by ticks and tells by a finer clock: on a busy virtual machine they are a tenth
# apart and more. The code cannot send itself SIGKILL, so little else but this limit can have.
_MUCH = 0.5


@dataclass(frozen=True)
class ProcessExit:
    """How the code in a sandbox ended.

    `returncode` as in `subprocess`: negative for a signal. `stopped` says which limit ended it, or
    that its caller did; None where it ended by itself.
    """

    returncode: int
    stopped: Literal["wall", "cpu", "output", "caller"] | None
    cpu_s: float
    seconds: float
    missing: Mapping[Guard, str]

    def __str__(self) -> str:
        if self.stopped is not None:
            return {
                "wall": "it was killed: its time was up",
                "cpu": "it was killed: its processor time was up",
                "output": "it was killed: it wrote too much",
                "caller": "it was ended by its caller",
            }[self.stopped]
        if self.returncode < 0:
            return f"it died of {signal.Signals(-self.returncode).name}"
        return f"it ended with exit code {self.returncode}"


class Sandbox:
    """A fresh process from entry on, gone with all that it started on exit.

    `fds` are what its job may use of this process' descriptors; the job knows their order.
    """

    def __init__(self, limits: Limits, allow_missing: Set[Guard], fds: Sequence[int]) -> None:
        self._limits = limits
        self._allow_missing = allow_missing
        self._fds = fds

    def __enter__(self) -> "Sandbox":
        with ExitStack() as stack:
            # Used only where the machine has no private root, and that is allowed.
            self._folder = "/"
            if Guard.FILES in self._allow_missing:
                self._folder = stack.enter_context(TemporaryDirectory())
                Path(self._folder).chmod(0o777)
            self._line, theirs = socket.socketpair()
            stack.enter_context(self._line)
            self._words = stack.enter_context(self._line.makefile("rwb"))
            with theirs:
                _NURSERY.fork(theirs, self._fds)
            stack.callback(self._end)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def fileno(self) -> int:
        """Return the descriptor that can be read from once the code has ended."""
        return self._line.fileno()

    def begin(self, role: str, job: Mapping[str, object]) -> None:
        """Send the code in. EvaluationError where a guard is missing that must not be."""
        words = self._listen()
        if words is None:
            raise EvaluationError(
                "the sandbox's interpreter did not start",
                do="look whether `python -BPSs` starts here with no environment",
            )
        self._pid: int = words["pid"]
        missing = _guards(words["missing"])
        change_ids = os.geteuid() == 0
        if Guard.USER not in missing:
            try:
                change_ids = _map_ids(self._pid)
            except OSError as error:
                missing[Guard.USER] = f"its ids cannot be mapped: {error.strerror or error}"
        refuse(missing, self._allow_missing)
        order = {
            "allow_missing": sorted(self._allow_missing),
            "change_ids": change_ids,
            "folder": self._folder,
            "job": job,
            "library": LIBRARY,
            "limits": asdict(self._limits),
            "missing": missing,
            "paths": python_paths(),
            "role": role,
        }
        with suppress(ConnectionError):  # `ending` tells it
            self._words.write(json.dumps(order).encode() + b"\n")
            self._words.flush()

    def stop(self) -> None:
        """Ask for the end of the code; `ending` tells it."""
        with suppress(OSError):
            self._line.shutdown(socket.SHUT_WR)

    def ending(self) -> ProcessExit:
        """Wait for the end of the code and of all that it started."""
        words = self._listen()
        if words is None:  # killed from outside, as when memory runs out: the code went with it
            return ProcessExit(-signal.SIGKILL, None, 0.0, 0.0, {})
        missing = _guards(words["missing"])
        refuse(missing, self._allow_missing)
        stopped = words["stopped"]
        killed = words["returncode"] == -signal.SIGKILL
        if stopped is None and killed and words["cpu_s"] >= _MUCH * self._limits.cpu_s:
            stopped = "cpu"
        return ProcessExit(words["returncode"], stopped, words["cpu_s"], words["seconds"], missing)

    def _listen(self) -> Any:
        try:
            line = self._words.readline()
        except ConnectionError:
            line = b""
        words = json.loads(line) if line else None
        if words and "error" in words:
            raise EvaluationError(
                "the sandbox broke, and not by the code in it", found=words["error"]
            )
        return words

    def _end(self) -> None:
        self.stop()
        self._line.settimeout(_PATIENCE_S)
        try:
            while self._line.recv(1 << 16):
                pass
        except TimeoutError:
            os.kill(self._pid, signal.SIGKILL)
        except ConnectionError:
            pass


def _guards(words: Mapping[str, str]) -> dict[Guard, str]:
    return {Guard(name): why for name, why in words.items()}


def _map_ids(pid: int) -> bool:
    """Give the process' new user namespace its ids; return whether the code is to change to NOBODY.

    For root, itself (to set up the sandbox) and NOBODY, which the code becomes: the kernel counts
    no processes of root's. For anybody else only the own id can be mapped: to NOBODY.
    """
    process = Path(f"/proc/{pid}")
    if os.geteuid() == 0:
        both = f"0 0 1\n{NOBODY} {NOBODY} 1\n"
        with suppress(PermissionError):
            (process / "uid_map").write_text(both)
            (process / "gid_map").write_text(both)
            return True
        if Path("/proc/self/uid_map").read_text().split()[:2] == ["0", "0"]:
            raise PermissionError("this is root, and may become nobody else")
    (process / "setgroups").write_text("deny")
    (process / "uid_map").write_text(f"{NOBODY} {os.geteuid()} 1\n")
    (process / "gid_map").write_text(f"{NOBODY} {os.getegid()} 1\n")
    return False
