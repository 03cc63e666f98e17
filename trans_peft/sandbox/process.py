"""One sandbox, seen from the process that starts it: start, wait, terminate.

This process does what the sandbox cannot do itself: it writes the id maps of the user namespace. It
then sends a request and waits for a report. It treats everything that the program sends as bytes.
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

from trans_peft.sandbox.child import NOBODY
from trans_peft.sandbox.errors import SandboxFailedError
from trans_peft.sandbox.forkserver import LIBRARY, ForkServer
from trans_peft.sandbox.guards import Guard, require_guards
from trans_peft.sandbox.limits import SandboxLimits
from trans_peft.sandbox.root import python_paths

__all__ = ["ProcessExit", "Sandbox"]

_fork_server = ForkServer()
_EXIT_TIMEOUT_S = 10
# The kernel limits processor time in ticks and reports it from a finer clock. On a busy virtual
# machine the two differ by a tenth and more. The program cannot send itself SIGKILL, so a SIGKILL
# after this share of the limit means that the limit was reached.
_CPU_LIMIT_SHARE = 0.5


@dataclass(frozen=True)
class ProcessExit:
    """How the program in a sandbox ended.

    Attributes:
        returncode: as in `subprocess`: negative for a signal.
        stopped_by: the limit that ended the program, "caller" if its caller ended it, None if it
            ended by itself.
        cpu_s: processor time that it used, in seconds.
        wall_s: elapsed time, in seconds.
        missing: the guards that were missing, with the reasons. The caller allowed all of them.
    """

    returncode: int
    stopped_by: Literal["wall", "cpu", "output", "caller"] | None
    cpu_s: float
    wall_s: float
    missing: Mapping[Guard, str]

    def __str__(self) -> str:
        if self.stopped_by is not None:
            return {
                "wall": "killed at its limit of elapsed time",
                "cpu": "killed at its limit of processor time",
                "output": "killed at its limit of output",
                "caller": "killed by its caller",
            }[self.stopped_by]
        if self.returncode < 0:
            return f"ended by signal {signal.Signals(-self.returncode).name}"
        return f"ended with exit code {self.returncode}"


class Sandbox:
    """A context manager that holds one sandbox. On exit, all of its processes have ended.

    `allow_missing` names guards that may be missing. `fds` are the descriptors of this process that
    the job may use, in the order that the job expects.
    """

    def __init__(
        self, limits: SandboxLimits, allow_missing: Set[Guard], fds: Sequence[int]
    ) -> None:
        self._limits = limits
        self._allow_missing = allow_missing
        self._fds = fds

    def __enter__(self) -> "Sandbox":
        with ExitStack() as stack:
            # Used only if the machine cannot create a private root and the caller allows that.
            self._working_folder = "/"
            if Guard.FILES in self._allow_missing:
                self._working_folder = stack.enter_context(TemporaryDirectory())
                Path(self._working_folder).chmod(0o777)
            self._control, child_socket = socket.socketpair()
            stack.enter_context(self._control)
            self._stream = stack.enter_context(self._control.makefile("rwb"))
            with child_socket:
                _fork_server.fork(child_socket, self._fds)
            stack.callback(self._end)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when the program has ended."""
        return self._control.fileno()

    def start(self, role: str, job: Mapping[str, object]) -> None:
        """Start the job.

        MissingGuardsError if a guard is missing that `allow_missing` does not name;
        SandboxFailedError if the sandbox does not start.
        """
        report = self._read_report()
        if report is None:
            raise SandboxFailedError(
                "the interpreter of the sandbox did not start",
                do="run `env -i python -BPSs -c pass` on this machine and read its error",
            )
        self._pid: int = report["pid"]
        missing = _guards(report["missing"])
        change_ids = os.geteuid() == 0
        if Guard.USER not in missing:
            try:
                change_ids = _write_id_maps(self._pid)
            except OSError as error:
                missing[Guard.USER] = f"its ids cannot be mapped: {error.strerror or error}"
        require_guards(missing, self._allow_missing)
        request = {
            "allow_missing": sorted(self._allow_missing),
            "change_ids": change_ids,
            "job": job,
            "library": LIBRARY,
            "limits": asdict(self._limits),
            "missing": missing,
            "paths": python_paths(),
            "role": role,
            "working_folder": self._working_folder,
        }
        with suppress(ConnectionError):  # the sandbox was killed, which `wait` reports
            self._stream.write(json.dumps(request).encode() + b"\n")
            self._stream.flush()

    def terminate(self) -> None:
        """Ask the supervisor to kill the program. Does not wait for its end."""
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)

    def wait(self) -> ProcessExit:
        """Wait until the program and everything that it started have ended."""
        report = self._read_report()
        if report is None:  # killed from outside, for example when the machine is out of memory
            return ProcessExit(-signal.SIGKILL, None, 0.0, 0.0, {})
        missing = _guards(report["missing"])
        require_guards(missing, self._allow_missing)
        stopped_by, cpu_s = report["stopped_by"], report["cpu_s"]
        killed = report["returncode"] == -signal.SIGKILL
        if stopped_by is None and killed and cpu_s >= _CPU_LIMIT_SHARE * self._limits.cpu_s:
            stopped_by = "cpu"
        return ProcessExit(report["returncode"], stopped_by, cpu_s, report["wall_s"], missing)

    def _read_report(self) -> Any:
        try:
            line = self._stream.readline()
        except ConnectionError:
            line = b""
        report = json.loads(line) if line else None
        if report and "error" in report:
            raise SandboxFailedError(
                "the sandbox failed, which is not an error of the program",
                found=report["error"],
                do="correct what the operating system reports, such as a full disk or too many "
                "processes, and evaluate again",
            )
        return report

    def _end(self) -> None:
        self.terminate()
        self._control.settimeout(_EXIT_TIMEOUT_S)
        try:
            while self._control.recv(1 << 16):
                pass
        except TimeoutError:
            os.kill(self._pid, signal.SIGKILL)
        except ConnectionError:
            pass


def _guards(reasons: Mapping[str, str]) -> dict[Guard, str]:
    return {Guard(name): why for name, why in reasons.items()}


def _write_id_maps(pid: int) -> bool:
    """Map the ids of a process's new user namespace. Return whether the child must change its ids.

    For root, two ids are mapped: root, which sets up the sandbox, and NOBODY, which the child
    becomes, because the kernel does not count root's processes. Any other user can map only its own
    id, to NOBODY.
    """
    process = Path(f"/proc/{pid}")
    if os.geteuid() == 0:
        both = f"0 0 1\n{NOBODY} {NOBODY} 1\n"
        with suppress(PermissionError):
            (process / "uid_map").write_text(both)
            (process / "gid_map").write_text(both)
            return True
        if Path("/proc/self/uid_map").read_text().split()[:2] == ["0", "0"]:
            raise PermissionError("root may not change to another user")
    (process / "setgroups").write_text("deny")
    (process / "uid_map").write_text(f"{NOBODY} {os.geteuid()} 1\n")
    (process / "gid_map").write_text(f"{NOBODY} {os.getegid()} 1\n")
    return False
