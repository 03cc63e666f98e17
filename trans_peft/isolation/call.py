"""The caller's side of an isolated call: the request, the deadline, and the answer or its error."""

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
from trans_peft.isolation.limits import Limits
from trans_peft.isolation.server import LENGTH, receive_exactly

__all__ = ["call_isolated"]

_START_S = 600.0
"""How long the server may take to start and to import modules on a busy machine."""
_GRACE_S = 30.0
"""How long after its wall limit the end of a call is awaited before the server is restarted."""
_STOP_S = 0.5
"""How long the server may take to end by itself; its children end with it."""
_STDERR_BYTES = 2_000
_RAISE = "if the content is trusted, simplify it; the limits are constants of this version"


def call_isolated(
    function: Callable[..., Any],
    *args: Any,
    subject: str,
    limits: Limits | None = None,
    imports: Sequence[str] = (),
) -> Any:
    """Return `function(*args)`, computed in a child process with limits.

    `function` must be importable by its module and name. `args` travel by pickle. The result
    travels as JSON, because the child handled untrusted content: None, bool, int, float, str,
    lists, and dicts with str keys; tuples arrive as lists. `subject` names the content in errors
    ("the tokenizer of s3://bucket/base"). `imports` names modules that take long to import; the
    fork server imports them once, outside the limits.

    Any thread may call. Each call has a process of its own and shares no state with others.

    Raises the error of `trans_peft.errors` that the function raised, with its text;
    LimitExceededError where a limit was exceeded; ContentError where the function raised anything
    else or its process crashed; IsolationError where the process was killed from outside or could
    not be started, which says nothing about the content.
    """
    if function.__module__ == "__main__" or "<" in function.__qualname__:
        raise TypeError(f"{function.__qualname__} cannot be imported by name in a child process")
    limits = limits or Limits()
    request = pickle.dumps((function, args))
    header = {
        "path": sys.path,
        "imports": [*imports, function.__module__],
        "folder": _working_directory(),
        "limits": asdict(limits),
    }
    for attempt in (1, 2):
        try:
            return _Call(subject, limits).run(json.dumps(header).encode(), request)
        except _NotStartedError as error:
            if attempt == 2:
                raise IsolationError(
                    f"no process could be started to evaluate {subject}",
                    found=error,
                    do="check the machine's memory and its limits on processes, then run again",
                ) from error
            _server.stop()
    raise AssertionError


class _NotStartedError(Exception):
    """The server ended or did not answer before the call had a process."""


class _Call:
    def __init__(self, subject: str, limits: Limits) -> None:
        self._subject = subject
        self._limits = limits

    def run(self, header: bytes, request: bytes) -> Any:
        call, its_call = socket.socketpair()
        status, its_status = socket.socketpair()
        with call, status, status.makefile("rb") as reports, _scratch() as stderr:
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
            answer = self._answer(call, request, deadline)
            if isinstance(answer, bytes):
                return self._result(answer)
            self._raise(_ending(status, reports, deadline), stderr)

    def _answer(self, call: socket.socket, request: bytes, deadline: float) -> bytes | None:
        """Return the child's answer; None where it ended, or hangs, without one."""
        with suppress(OSError):  # it ended before it read everything: its status says why
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

    def _result(self, answer: bytes) -> Any:
        match self._read(answer):
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
        raise ContentError(f"evaluating {self._subject} gave no readable answer")

    def _read(self, answer: bytes) -> Any:
        try:
            return json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise ContentError(
                f"evaluating {self._subject} gave no readable answer", found=error
            ) from error

    def _raise(self, ending: dict[str, Any] | None, stderr: BinaryIO) -> NoReturn:
        if ending is None:
            _server.stop()
            raise IsolationError(
                f"the process that evaluates {self._subject} does not end",
                found=f"nothing {_GRACE_S:.0f} s after its limit of {self._limits.wall_s:g} s",
                do="run again when the machine is less busy",
            )
        if ending.get("limit") == "wall":
            self._exceeded("wall")
        code = ending.get("code")
        stderr.seek(0)
        stderr_text = stderr.read(64 << 10).decode(errors="replace")
        said = stderr_text[-_STDERR_BYTES:].strip()
        if code == -signal.SIGXCPU:
            self._exceeded("cpu")
        if code == 3 or "memory allocation of" in stderr_text or "bad_alloc" in stderr_text:
            self._exceeded("memory")
        if code in (-signal.SIGKILL, -signal.SIGTERM):
            raise IsolationError(
                f"the process that evaluates {self._subject} was killed from outside",
                found=f"signal {-code} ({signal.Signals(-code).name}), as a kernel that is out of"
                " memory sends it",
                do="run again with more free memory on the machine",
            )
        ended = f"exit code {code}"
        if isinstance(code, int) and code < 0:
            ended = f"signal {-code} ({signal.Signals(-code).name})"
        raise ContentError(
            f"{self._subject} cannot be evaluated: the process that tried crashed",
            found=f"{ended}{': ' if said else ''}{said}",
        )

    def _exceeded(self, kind: str, found: object = None) -> NoReturn:
        limits = self._limits
        words, value = {
            "cpu": ("processor time", f"{limits.cpu_s:g} s"),
            "wall": ("time", f"{limits.wall_s:g} s"),
            "memory": ("memory", f"{limits.memory_bytes / 2**20:.0f} MiB"),
            "result": ("room for its result", f"{limits.result_bytes / 2**20:.0f} MiB"),
        }[kind]
        raise LimitExceededError(
            f"{self._subject} needs more {words} than an evaluation may take",
            expected=f"at most {value}",
            found=f"{found} bytes" if found is not None else "more; it was stopped",
            do=_RAISE,
        )


def _ending(status: socket.socket, reports: Any, deadline: float) -> dict[str, Any] | None:
    """Return how the server says that the child ended, None where it does not say."""
    ending: dict[str, Any] = {}
    try:
        while "code" not in ending:
            status.settimeout(max(0.1, deadline - time.monotonic()))
            line = reports.readline()
            if not line:
                return ending or {"code": -signal.SIGKILL}  # the server was killed, and it with it
            ending |= json.loads(line)
    except OSError:
        return ending or None
    return ending


class _Server:
    """The fork server of this process: started at first use, and again after it ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def send(self, fds: Sequence[int]) -> None:
        """Hand the descriptors of one call to the server. OSError where it does not run."""
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
        """Leave the server to the process that started it, in a fork of that process."""
        self._lock = threading.Lock()
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.returncode = 0  # it is no child of this process
        self._control = self._process = None

    def _start(self) -> None:
        if self._control is not None:
            self._control.close()
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-c",
                    f"from trans_peft.isolation.server import main; main({theirs.fileno()})",
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=child_environment(),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )


def _scratch() -> BinaryIO:
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
