"""Whether two mathematical answers are equal, by math-verify, in a process that may be killed.

math-verify guards itself with SIGALRM, which works in a main thread only and does not interrupt a
long operation on huge numbers. Here it runs without that guard in a process of its own
(`equality_process`), whose operating system ends it after `CPU_LIMIT_S` of processor time on one
comparison: so it works in any thread, and a busy machine changes no result. What takes longer, or
more memory, is not equal. A machine that gives the process no time at all is an error.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
from typing import Any

from trans_peft.errors import DataError, EvaluationError

__all__ = ["CPU_LIMIT_S", "equal", "math_verify"]

CPU_LIMIT_S = 5
_WALL_LIMIT_S = 600.0  # of a process that gets no processor time: says nothing of an answer
_LONGEST_ANSWER = 2_000  # characters; parsing costs more than linearly


def math_verify(marker: str) -> "_MathVerify":
    """Return the rule under which the final answers are mathematically equal.

    The final answer is what stands after the last `marker`, up to a full stop at a line's end (as
    MetaMath reads it); without a marker it is the whole text.
    """
    return _MathVerify(marker)


class _MathVerify:
    """`degree(answer, reference)`: 100 if their final answers are equal, else 0."""

    def __init__(self, marker: str) -> None:
        self._marker = marker

    def __call__(self, answer: str, reference: str) -> float:
        wanted = self._final(reference)
        if not wanted:
            raise DataError(f"nothing stands after {self._marker!r} in the reference")
        given = self._final(answer)
        return 100.0 if given and equal(given, wanted) else 0.0

    def _final(self, text: str) -> str:
        _, found, rest = text.rpartition(self._marker) if self._marker else ("", "yes", text)
        return rest.split(".\n")[0].strip().removesuffix(".").strip() if found else ""


def equal(answer: str, reference: str) -> bool:
    """Return whether two answers (text or LaTeX, without words around them) are equal.

    The same text is equal. Any thread may ask. Raises EvaluationError where the process that
    compares cannot be started.
    """
    if answer == reference:
        return True
    if len(answer) > _LONGEST_ANSWER:
        return False
    with _lock:
        return _process.ask({"answer": answer, "reference": reference, "cpu_limit_s": CPU_LIMIT_S})


class _Process:
    """The process that compares: started when first asked, again after it was killed."""

    def __init__(self) -> None:
        self._running: subprocess.Popen[str] | None = None

    def ask(self, question: dict[str, Any]) -> bool:
        process = self._running or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            line = self._line(process)
        except BrokenPipeError:
            line = ""
        if not line:
            self.stop()
            return False
        return bool(json.loads(line))

    def stop(self) -> None:
        if self._running is not None:
            self._running.kill()
            self._running.communicate()
            self._running = None

    def _start(self) -> "subprocess.Popen[str]":
        self._running = process = subprocess.Popen(
            [sys.executable, "-m", "trans_peft.validation.rules.equality_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # sympy's order of terms, and so the time it takes, would differ from run to run.
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        if self._line(process) != "ready\n":
            self.stop()
            raise EvaluationError(
                "the process that compares mathematical answers does not start",
                do="see what `python -m trans_peft.validation.rules.equality_process` says",
            )
        return process

    @staticmethod
    def _line(process: "subprocess.Popen[str]") -> str:
        """Return the next line, empty if the process ended."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], _WALL_LIMIT_S)
        if not ready:
            process.kill()
            raise EvaluationError(
                "a comparison of mathematical answers has not ended",
                found=f"nothing after {_WALL_LIMIT_S:.0f} s; at most {CPU_LIMIT_S} s of processor "
                "time are needed",
                do="run again when the machine is less busy",
            )
        return process.stdout.readline()


_process = _Process()
_lock = threading.Lock()
atexit.register(_process.stop)
