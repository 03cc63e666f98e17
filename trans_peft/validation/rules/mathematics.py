"""Whether two mathematical answers are equal, by math-verify, in a process that may be killed.

math-verify guards itself with SIGALRM, which works in a main thread only and does not interrupt a
long operation on huge numbers. Here it runs without that guard in a process of its own
(`trans_peft.isolation.limited`), which is ended after `CPU_LIMIT_S` of processor time on one
comparison. What takes longer, or more memory, is not equal. A machine that gives the process no
time at all is an error.
"""

from trans_peft.errors import DataError
from trans_peft.isolation.limited import Limited

__all__ = ["CPU_LIMIT_S", "equal", "math_verify"]

CPU_LIMIT_S = 5
_LONGEST_ANSWER = 2_000  # characters; parsing costs more than linearly
_process = Limited("trans_peft.validation.rules.equality_process")


def math_verify(marker: str) -> "_MathVerify":
    """Return the rule under which the final answers are mathematically equal.

    The final answer is what stands after the last `marker`, up to a full stop at a line's end
    (as MetaMath reads it); without a marker it is the whole text.
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
    compares cannot be started or gets no time.
    """
    if answer == reference:
        return True
    if len(answer) > _LONGEST_ANSWER:
        return False
    return bool(_process.ask([answer, reference], cpu_limit_s=CPU_LIMIT_S))
