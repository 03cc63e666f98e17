"""A long-lived process for many small questions, ended and started anew when one takes too long.

`call_isolated` forks a process for each call. Comparing answers asks thousands of questions of a
millisecond each, so they share a process; each question has its own limit on processor time. That
holds in any thread and inside C code, where no signal handler of Python would run. Questions and
answers are JSON, a line each.
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
from trans_peft.isolation.limits import Limits

__all__ = ["Limited", "serve"]

_WALL_LIMIT_S = 600.0  # of a process that gets no processor time: says nothing of an answer
_ANY_CPU_S = 1 << 30  # each question brings its own
_READY = "ready\n"


class Limited:
    """A module whose `main` calls `serve`: started when first asked, again after it was ended."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._running: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        atexit.register(self.stop)

    def ask(self, question: Any, *, cpu_limit_s: int) -> Any:
        """Return the answer; None where the process needed more than that, or was killed.

        Any thread may ask. Raises EvaluationError where the process cannot be started, or the
        machine gives it no time at all.
        """
        with self._lock:
            process = self._running or self._start()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([question, cpu_limit_s]) + "\n")
                process.stdin.flush()
                line = self._line(process)
            except BrokenPipeError:
                line = ""
            if not line:
                self.stop()
                return None
            return json.loads(line)

    def stop(self) -> None:
        """End the process, if there is one."""
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
        if self._line(process) != _READY:
            self.stop()
            raise EvaluationError(
                "the process that compares answers does not start",
                do=f"see what `python -m {self._module}` says",
            )
        return process

    def _line(self, process: "subprocess.Popen[str]") -> str:
        """Return the next line, empty if the process ended."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], _WALL_LIMIT_S)
        if not ready:
            self.stop()
            raise EvaluationError(
                "a comparison of answers has not ended",
                found=f"nothing after {_WALL_LIMIT_S:.0f} s",
                do="run again when the machine is less busy",
            )
        return process.stdout.readline()


def serve(answer: Callable[[Any], Any], *, memory_bytes: int = 1 << 30) -> None:
    """Answer questions from standard input until there are no more: the process's side.

    `memory_bytes` bounds what answers may take beyond what the process has when it begins.
    """
    limits = Limits(cpu_s=_ANY_CPU_S, memory_bytes=memory_bytes)
    limits.apply()
    _say(_READY)
    for line in sys.stdin:
        question, cpu_limit_s = json.loads(line)
        limit_s = int(time.process_time()) + 1 + cpu_limit_s
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s, resource.RLIM_INFINITY))
        _say(json.dumps(answer(question)) + "\n")


def _say(line: str) -> None:
    sys.stdout.write(line)
    sys.stdout.flush()
