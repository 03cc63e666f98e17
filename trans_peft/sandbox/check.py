"""Test a program where it cannot influence the verdict, with two sandboxes.

The reference harnesses (openai/human-eval, google-research's MBPP) run program and tests in one
interpreter. There a program passes if it exits early, replaces `assert` or `isclose`, or returns an
object that equals everything. Here the tests and the program run in two sandboxes and exchange
calls and plain values. The verdict comes from the sandbox of the tests.

Values are copied between the sandboxes. A test therefore does not see that an argument was changed
in place. A returned value that is not plain cannot be compared: the program then fails as
unrepresentable.
"""

import ast
import os
import socket
from collections.abc import Set
from dataclasses import asdict, dataclass, replace

from trans_peft.sandbox.checker import FailureReason
from trans_peft.sandbox.errors import InvalidTestsError
from trans_peft.sandbox.guards import Guard
from trans_peft.sandbox.limits import SandboxLimits
from trans_peft.sandbox.process import Sandbox
from trans_peft.sandbox.protocol import InvalidMessageError, receive

__all__ = ["CodeResult", "CodeTests", "FailureReason", "check_program"]

# The tests get this much more time than the program, so that they see the program time out.
_EXTRA_WALL_S = 5.0


@dataclass(frozen=True)
class CodeTests:
    """Tests of a program: Python text that raises an exception unless the program is right.

    All of it comes from a data set, none of it from a model. InvalidTestsError if a text is not
    Python, or if `names` is empty.

    Attributes:
        tests: the text of the tests.
        names: the names that the tests use of the program. Every other name is one of the tests, of
            `preamble`, or of Python.
        preamble: Python text that runs before the tests.
    """

    tests: str
    names: tuple[str, ...]
    preamble: str = ""

    def __post_init__(self) -> None:
        problems = [] if self.names else ["they use no name of the program"]
        for what, text in (("tests", self.tests), ("preamble", self.preamble)):
            try:
                ast.parse(text)
            except (MemoryError, RecursionError, SyntaxError, ValueError) as error:
                problems.append(f"the {what} are not Python: {error}")
        if problems:
            raise InvalidTestsError(f"invalid tests: {'; '.join(problems)}", found=self.tests)


@dataclass(frozen=True)
class CodeResult:
    """Whether a program passed its tests.

    Attributes:
        passed: True only if all tests ran and raised nothing.
        reason: why the program passed or failed.
        detail: an explanation, which may quote the tests and the program.
    """

    passed: bool
    reason: FailureReason
    detail: str = ""


def check_program(
    program: str,
    tests: CodeTests,
    limits: SandboxLimits = SandboxLimits(),  # noqa: B008  frozen
    allow_missing: Set[Guard] = frozenset(),
) -> CodeResult:
    """Test the text of a Python program, which can import the standard library only.

    Nothing that the program does raises an exception here. MissingGuardsError if this machine lacks
    a guard that is not in `allow_missing`; then no program was run. SandboxFailedError.
    """
    checker_limits = replace(limits, wall_s=limits.wall_s + _EXTRA_WALL_S)
    candidate_socket, checker_socket = socket.socketpair()
    read_fd, write_fd = os.pipe()
    verdict, verdict_writer = os.fdopen(read_fd, "rb"), os.fdopen(write_fd, "wb")
    checker_fds = [checker_socket.fileno(), verdict_writer.fileno()]
    with (
        candidate_socket, checker_socket, verdict, verdict_writer,
        Sandbox(limits, allow_missing, [candidate_socket.fileno()]) as candidate,
        Sandbox(checker_limits, allow_missing, checker_fds) as checker,
    ):  # fmt: skip
        for end in (candidate_socket, checker_socket, verdict_writer):
            end.close()  # so that each sandbox reads the end of the other
        candidate.start("candidate", {"program": program})
        checker.start("checker", asdict(tests))
        try:
            message = receive(verdict)
            reason, detail = FailureReason(message["reason"]), message["detail"]
            if reason is FailureReason.ENDED:
                candidate.terminate()
                reason, how = _ended(candidate)
                detail = f"{detail}: {how}"
        except (EOFError, InvalidMessageError):
            reason, how = _ended(checker)
            detail = f"the tests gave no verdict: {how}"
    return CodeResult(reason is FailureReason.PASSED, reason, detail)


def _ended(sandbox: Sandbox) -> tuple[FailureReason, str]:
    ended = sandbox.wait()
    timed_out = ended.stopped_by in ("wall", "cpu")
    return FailureReason.TIMED_OUT if timed_out else FailureReason.ENDED, str(ended)
