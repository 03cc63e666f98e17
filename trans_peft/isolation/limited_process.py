"""A long-running process for many small calls, killed and started again if one takes too long.

`call_isolated` forks a process for each call. A comparison of answers needs thousands of calls of a
millisecond each, so they share one process. Each call has its own limit on processor time, which
the kernel enforces in every thread and inside C code, where no signal handler of Python runs.
Arguments and results are JSON, one line each.
"""

import atexit
import json
import resource
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from trans_peft.errors import EvaluationError
from trans_peft.isolation.environment import child_environment
from trans_peft.isolation.limits import CallLimits

__all__ = ["LimitedProcess", "serve"]

_WALL_LIMIT_S = 600.0  # for a process that gets no processor time, which is not the call's fault
_UNLIMITED_CPU_S = 1 << 30  # each call sets its own limit
_READY = "ready\n"


class LimitedProcess:
    """Runs a module whose `main` calls `serve`, and sends calls to it.

    The process starts at the first call, and again after it was killed. Thread-safe.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._running: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        atexit.register(self.stop)

    def call(self, argument: Any, *, cpu_limit_s: int) -> Any:
        """Return the result of the served function.

        None if the call used more processor time than `cpu_limit_s`, or the process was killed.
        EvaluationError if the process does not start, or does not respond for 10 minutes.
        """
        with self._lock:
            process = self._running or self._start()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([argument, cpu_limit_s]) + "\n")
                process.stdin.flush()
                line = self._read_line(process)
            except BrokenPipeError:
                line = ""
            if not line:
                self.stop()
                return None
            return json.loads(line)

    def stop(self) -> None:
        """Kill the process if it runs."""
        if self._running is not None:
            self._running.kill()
            self._running.communicate()
            self._running = None

    def _start(self) -> "subprocess.Popen[str]":
        self._running = process = subprocess.Popen(
            [sys.executable, "-P", "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=child_environment(),
        )
        if self._read_line(process) != _READY:
            self.stop()
            raise EvaluationError(
                "the process that compares answers does not start",
                do=f"run `python -m {self._module}` and read its error",
            )
        return process

    def _read_line(self, process: "subprocess.Popen[str]") -> str:
        """Return the next line of the process, empty if it ended."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], _WALL_LIMIT_S)
        if not ready:
            self.stop()
            raise EvaluationError(
                "the process that compares answers does not respond",
                expected=f"a response within {_WALL_LIMIT_S:.0f} s",
                do="run again when the machine is less loaded",
            )
        return process.stdout.readline()


def serve(function: Callable[[Any], Any], *, memory_bytes: int = 1 << 30) -> None:
    """Call `function` with each argument from standard input, until that is closed.

    Runs inside the process. `memory_bytes` limits the memory that calls may use, in addition to
    what the process uses when `serve` begins.
    """
    limits = CallLimits(cpu_s=_UNLIMITED_CPU_S, memory_bytes=memory_bytes)
    limits.apply()
    _write(_READY)
    for line in sys.stdin:
        argument, cpu_limit_s = json.loads(line)
        limit_s = int(time.process_time()) + 1 + cpu_limit_s
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s, resource.RLIM_INFINITY))
        _write(json.dumps(function(argument)) + "\n")


def _write(line: str) -> None:
    sys.stdout.write(line)
    sys.stdout.flush()
