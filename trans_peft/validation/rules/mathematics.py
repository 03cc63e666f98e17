"""Compare mathematical answers with math-verify, in a process with limits.

math-verify limits its time with SIGALRM, which works in the main thread only and does not interrupt
a long operation on huge numbers. Here it runs without SIGALRM in a separate process
(`trans_peft.isolation.limited_process`), which is killed after `CPU_LIMIT_S` of processor time for
one comparison. Answers whose comparison exceeds the time or memory limit count as not equal.
"""

from trans_peft.domain.excerpts import excerpt
from trans_peft.errors import DataError
from trans_peft.isolation.limited_process import LimitedProcess

__all__ = ["CPU_LIMIT_S", "equal", "math_verify"]

CPU_LIMIT_S = 5
_LONGEST_ANSWER = 2_000  # characters; parsing costs more than linearly
_process = LimitedProcess("trans_peft.validation.rules.equality_process")


def math_verify(marker: str) -> "_MathVerify":
    """Return the rule that accepts mathematically equal final answers.

    The final answer is the text after the last `marker`, up to a full stop at the end of a line, as
    in MetaMath. With an empty marker it is the whole text.
    """
    return _MathVerify(marker)


class _MathVerify:
    """`degree(answer, reference)`: 100 if their final answers are equal, else 0."""

    def __init__(self, marker: str) -> None:
        self._marker = marker

    def __call__(self, answer: str, reference: str) -> float:
        expected = self._final(reference)
        if not expected:
            raise DataError(
                f"the reference has no text after {excerpt(self._marker)}",
                found=excerpt(reference),
            )
        actual = self._final(answer)
        return 100.0 if actual and equal(actual, expected) else 0.0

    def _final(self, text: str) -> str:
        _, found, rest = text.rpartition(self._marker) if self._marker else ("", "yes", text)
        return rest.split(".\n")[0].strip().removesuffix(".").strip() if found else ""


def equal(answer: str, reference: str) -> bool:
    """Return whether two answers (text or LaTeX, without other words) are equal.

    Equal texts are equal. Safe to call from any thread. Raises EvaluationError if the comparing
    process cannot be started or gets no processor time.
    """
    if answer == reference:
        return True
    if len(answer) > _LONGEST_ANSWER:
        return False
    return bool(_process.call([answer, reference], cpu_limit_s=CPU_LIMIT_S))
