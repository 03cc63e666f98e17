"""The caller's side of an isolated call: sends the request, waits, returns the result or raises."""

import atexit
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from trans_peft import errors
from trans_peft.errors import ContentError, IsolationError, LimitExceededError, TransPeftError
from trans_peft.isolation.environment import child_environment
from trans_peft.isolation.limits import CallLimits
from trans_peft.isolation.server import LENGTH, receive_exactly

__all__ = ["call_isolated", "prepare"]

_START_S = 600.0
"""How long the server may take to start and to import modules."""
_GRACE_S = 30.0
"""How long to wait after a call's wall limit before the server is restarted."""
_STOP_S = 0.5
"""How long the server may take to end by itself before it is killed."""
_STDERR_BYTES = 2_000
_LIMIT_ADVICE = "simplify the content; the limits are constants and cannot be configured"


def call_isolated(
    function: Callable[..., Any],
    *args: Any,
    subject: str,
    limits: CallLimits | None = None,
    imports: Sequence[str] = (),
) -> Any:
    """Return `function(*args)`, computed in a child process with limits.

    Each call has a process of its own and shares no state with others. The function is thread-safe.

    Args:
        function: a function that can be imported by its module and name.
        args: values that can be pickled.
        subject: what the content is, for errors ("the tokenizer of s3://bucket/base").
        limits: what the call may use. None: the defaults of `CallLimits`.
        imports: modules that are slow to import. The fork server imports them once, outside the
            limits.

    The result is sent as JSON, because the child handled untrusted content. It may consist of None,
    bool, int, float, str, lists, and dicts with str keys. Tuples become lists.

    Raises:
        TransPeftError: the function raised this error; type and text are the same.
        LimitExceededError: the call exceeded a limit.
        ContentError: the function raised any other exception, or its process crashed.
        IsolationError: the process did not start or was killed from outside. The content may be
            fine.
        TypeError: the function cannot be imported by name.
    """
    if function.__module__ == "__main__" or "<" in function.__qualname__:
        raise TypeError(f"{function.__qualname__} cannot be imported by name in a child process")
    limits = limits or CallLimits()
    request = pickle.dumps((function, args))
    header = _header([*imports, function.__module__], limits)
    for attempt in (1, 2):
        try:
            return _Call(subject, limits).run(header, request)
        except _NotStartedError as error:
            if attempt == 2:
                raise IsolationError(
                    f"the process that evaluates {subject} could not be started",
                    found=error,
                    do="check the machine's free memory and its limit on processes, then run again",
                ) from error
            _server.stop()
    raise AssertionError


def prepare(imports: Sequence[str]) -> None:
    """Start the fork server and import modules there, in the background.

    Otherwise the first call that needs these modules waits for their import, which takes seconds.
    Errors are left to that call.
    """

    def import_modules() -> None:
        limits = CallLimits()
        with suppress(_NotStartedError, TransPeftError):
            _Call("nothing", limits).run(_header(imports, limits), pickle.dumps((bool, ())))

    threading.Thread(target=import_modules, daemon=True).start()


def _header(imports: Sequence[str], limits: CallLimits) -> bytes:
    header = {
        "path": sys.path,
        "imports": [*imports],
        "folder": _working_directory(),
        "limits": asdict(limits),
    }
    return json.dumps(header).encode()


class _NotStartedError(Exception):
    """The server ended, or did not respond, before it forked a process for the call."""


class _Call:
    def __init__(self, subject: str, limits: CallLimits) -> None:
        self._subject = subject
        self._limits = limits

    def run(self, header: bytes, request: bytes) -> Any:
        call, its_call = socket.socketpair()
        status, its_status = socket.socketpair()
        with call, status, status.makefile("rb") as reports, _temporary_file() as stderr:
            try:
                with its_call, its_status:
                    _server.send((its_call.fileno(), its_status.fileno(), stderr.fileno()))
                status.settimeout(_START_S)
                call.settimeout(_START_S)
                call.sendall(LENGTH.pack(len(header)) + header)
                if not reports.readline():
                    raise _NotStartedError("the server ended")
            except OSError as error:
                raise _NotStartedError(f"{type(error).__name__}: {error}") from error
            deadline = time.monotonic() + self._limits.wall_s + _GRACE_S
            reply = self._exchange(call, request, deadline)
            if reply is not None:
                return self._result(reply)
            self._raise(_read_exit(status, reports, deadline), stderr)

    def _exchange(self, call: socket.socket, request: bytes, deadline: float) -> bytes | None:
        """Send the request and return the child's reply. None if it ended or hangs without one."""
        with suppress(OSError):  # it ended before it read everything; `_read_exit` returns why
            call.settimeout(max(0.1, deadline - time.monotonic()))
            call.sendall(LENGTH.pack(len(request)) + request)
        try:
            call.settimeout(max(0.1, deadline - time.monotonic()))
            (size,) = LENGTH.unpack(receive_exactly(call, LENGTH.size))
            if size > self._limits.result_bytes:
                self._exceeded("result", size)
            return receive_exactly(call, size)
        except (EOFError, OSError):
            return None

    def _result(self, reply: bytes) -> Any:
        match self._parse(reply):
            case {"result": result}:
                return result
            case {"limit": "memory" | "result" as limit, **rest}:
                self._exceeded(limit, rest.get("found"))
            case {"error": str(name), "text": str(text)}:
                kind = getattr(errors, name, None)
                if isinstance(kind, type) and issubclass(kind, TransPeftError):
                    raise kind(text)
            case {"other": str(name), "text": str(text)}:
                raise ContentError(f"{self._subject} cannot be evaluated", found=f"{name}: {text}")
        raise ContentError(f"the process that evaluates {self._subject} sent an invalid reply")

    def _parse(self, reply: bytes) -> Any:
        try:
            return json.loads(reply)
        except (ValueError, RecursionError) as error:
            raise ContentError(
                f"the process that evaluates {self._subject} sent an invalid reply", found=error
            ) from error

    def _raise(self, report: dict[str, Any] | None, stderr: BinaryIO) -> NoReturn:
        """Raise the error for a child without a reply. `report` is what `_read_exit` returned."""
        if report is None:
            _server.stop()
            raise IsolationError(
                f"the process that evaluates {self._subject} did not end at its limit",
                expected=f"its end after at most {self._limits.wall_s:g} s",
                found=f"it is still running {_GRACE_S:.0f} s later",
                do="run again when the machine is less loaded",
            )
        if report.get("limit") == "wall":
            self._exceeded("wall")
        code = report.get("code")
        stderr.seek(0)
        stderr_text = stderr.read(64 << 10).decode(errors="replace")
        last_output = stderr_text[-_STDERR_BYTES:].strip()
        if code == -signal.SIGXCPU:
            self._exceeded("cpu")
        if code == 3 or "memory allocation of" in stderr_text or "bad_alloc" in stderr_text:
            self._exceeded("memory")
        if code in (-signal.SIGKILL, -signal.SIGTERM):
            raise IsolationError(
                f"the process that evaluates {self._subject} was killed from outside",
                found=f"signal {-code} ({signal.Signals(-code).name}), which the kernel sends when"
                " the machine is out of memory",
                do="free memory on the machine and run again",
            )
        ended = f"exit code {code}"
        if isinstance(code, int) and code < 0:
            ended = f"signal {-code} ({signal.Signals(-code).name})"
        raise ContentError(
            f"{self._subject} cannot be evaluated: the process that evaluates it crashed",
            found=f"{ended}{': ' if last_output else ''}{last_output}",
        )

    def _exceeded(self, kind: str, found: object = None) -> NoReturn:
        limits = self._limits
        resource, value = {
            "cpu": ("processor time", f"{limits.cpu_s:g} s"),
            "wall": ("time", f"{limits.wall_s:g} s"),
            "memory": ("memory", f"{limits.memory_bytes / 2**20:.0f} MiB"),
            "result": ("space for its result", f"{limits.result_bytes / 2**20:.0f} MiB"),
        }[kind]
        raise LimitExceededError(
            f"{self._subject} needs more {resource} than an evaluation may take",
            expected=f"at most {value}",
            found=f"{found} bytes"
            if found is not None
            else "more; the process was killed at the limit",
            do=_LIMIT_ADVICE,
        )


def _read_exit(status: socket.socket, reports: Any, deadline: float) -> dict[str, Any] | None:
    """Return the server's report of how the child ended. None if there is none by the deadline."""
    report: dict[str, Any] = {}
    try:
        while "code" not in report:
            status.settimeout(max(0.1, deadline - time.monotonic()))
            line = reports.readline()
            if not line:
                return report or {"code": -signal.SIGKILL}  # server and child were killed
            report |= json.loads(line)
    except OSError:
        return report or None
    return report


class _Server:
    """The fork server of this process. It starts at first use, and again after it ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def send(self, fds: Sequence[int]) -> None:
        """Send the descriptors of one call to the server. OSError if the server does not run."""
        with self._lock:
            if self._control is None or self._process is None or self._process.poll() is not None:
                self._start()
            assert self._control is not None
            socket.send_fds(self._control, [b"."], fds)

    def stop(self) -> None:
        """End the server and all its children."""
        with self._lock:
            control, process = self._control, self._process
            self._control = self._process = None
        if control is not None:
            control.close()
        if process is not None:
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def forget(self) -> None:
        """Close this process's handle of the server, after a fork. The server keeps running."""
        self._lock = threading.Lock()
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.returncode = 0  # it is not a child of this process
        self._control = self._process = None

    def _start(self) -> None:
        if self._control is not None:
            self._control.close()
        self._control, child_socket = socket.socketpair()
        with child_socket:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-c",
                    f"from trans_peft.isolation.server import main; main({child_socket.fileno()})",
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=child_environment(),
                pass_fds=(child_socket.fileno(),),
                start_new_session=True,
            )


def _temporary_file() -> BinaryIO:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("stderr"), "w+b")
    return tempfile.TemporaryFile()


def _working_directory() -> str:
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        return "/"


_server = _Server()
atexit.register(_server.stop)
os.register_at_fork(after_in_child=_server.forget)
