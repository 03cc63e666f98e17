"""Whether a program passes tests, decided where the program cannot reach: HumanEval's and MBPP's.

The reference harnesses (openai/human-eval, google-research's MBPP) run program and tests in one
interpreter, where a program that ends early, prints, replaces `assert` or `isclose`, or returns an
object that equals everything, counts as right. Here tests and program live in two sandboxes and
exchange calls and plain values; the verdict comes from the tests' side alone.

What follows from values that travel as copies: a test does not see that an argument was changed in
place, and an answer that is no plain value cannot be compared; it counts as not passed and says so.
"""

import ast
import builtins
import os
import socket
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass, replace
from symtable import Symbol, SymbolTable, symtable

from trans_peft.errors import DataError
from trans_peft.validation.sandbox.checker import FailureReason
from trans_peft.validation.sandbox.guards import Guard
from trans_peft.validation.sandbox.limits import Limits
from trans_peft.validation.sandbox.process import Sandbox
from trans_peft.validation.sandbox.protocol import BadMessage, receive

__all__ = [
    "CodeResult",
    "CodeTests",
    "FailureReason",
    "check_code",
    "humaneval_tests",
    "mbpp_tests",
]

_PATIENCE_S = 5.0  # of the tests' side, so that it sees a program end whose time is up


@dataclass(frozen=True)
class CodeTests:
    """Tests of a program: Python text that raises unless the program is right.

    `names` are what the tests use of the program; every other name is theirs, `preamble`'s, which
    runs before them, or Python's. All of it comes from the data set, none from a model.
    """

    tests: str
    names: tuple[str, ...]
    preamble: str = ""

    def __post_init__(self) -> None:
        problems = [] if self.names else ["they use nothing of the program"]
        for what, text in (("tests", self.tests), ("preamble", self.preamble)):
            try:
                ast.parse(text)
            except (MemoryError, RecursionError, SyntaxError, ValueError) as error:
                problems.append(f"the {what} are not Python: {error}")
        if problems:
            raise DataError(f"tests that cannot be used: {'; '.join(problems)}", found=self.tests)


@dataclass(frozen=True)
class CodeResult:
    """Whether a program passed, and why not; `detail` may quote the tests and the program."""

    passed: bool
    reason: FailureReason
    detail: str = ""


def humaneval_tests(prompt: str, test: str, entry_point: str) -> CodeTests:
    """Return the tests of a HumanEval row; the program is its prompt and a completion.

    Helpers that the prompt defines and the tests use are the prompt's: a completion that defines
    them anew changes nothing.
    """
    return CodeTests(f"{test}\n\ncheck({entry_point})\n", (entry_point,), preamble=prompt)


def mbpp_tests(test_list: Sequence[str], reference: str, setup: str = "") -> CodeTests:
    """Return the tests of an MBPP row: `test_list`, `code` and `test_setup_code` (or imports).

    The program is asked for what the tests use and the reference solution defines, so that one
    which defines `set` or `abs` changes nothing. The reference's imports are the tests' too: some
    rely on them.
    """
    source = "\n".join((setup, *test_list))
    try:
        imports = [
            ast.unparse(node)
            for node in ast.parse(reference).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        solution, tests = (symtable(text, "a row", "exec") for text in (reference, source))
    except (SyntaxError, ValueError) as error:
        raise DataError("a row of MBPP that is not Python", found=str(error)) from None
    known, own = _bound(solution), _bound(tests)
    used = {
        symbol.get_name()
        for scope in _scopes(tests)
        for symbol in scope.get_symbols()
        if symbol.is_referenced() and symbol.is_global()
    } - own.keys()
    unknown = used - known.keys() - set(dir(builtins))
    if unknown:
        raise DataError(
            "tests of MBPP that use what nothing defines",
            expected="names of the reference solution, the setup or Python",
            found=", ".join(sorted(unknown)),
        )
    names = sorted(name for name in used & known.keys() if not known[name].is_imported())
    return CodeTests(source, tuple(names), preamble="\n".join(imports))


def _bound(module: SymbolTable) -> dict[str, Symbol]:
    symbols = (symbol for symbol in module.get_symbols() if symbol.is_local())
    return {symbol.get_name(): symbol for symbol in symbols}


def _scopes(table: SymbolTable) -> Iterator[SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _scopes(child)


def check_code(
    program: str,
    tests: CodeTests,
    *,
    limits: Limits = Limits(),  # noqa: B008  frozen
    allow_missing: Set[Guard] = frozenset(),
) -> CodeResult:
    """Check a program (its text), standard library only.

    Whatever the program does, it is a result and no exception. EvaluationError where this machine
    lacks a guard that is not in `allow_missing`; then nothing was run.
    """
    patient = replace(limits, wall_s=limits.wall_s + _PATIENCE_S)
    theirs, ours = socket.socketpair()
    verdict_fd, sentence_fd = os.pipe()
    verdict, sentence = os.fdopen(verdict_fd, "rb"), os.fdopen(sentence_fd, "wb")
    with (
        theirs, ours, verdict, sentence,
        Sandbox(limits, allow_missing, [theirs.fileno()]) as candidate,
        Sandbox(patient, allow_missing, [ours.fileno(), sentence.fileno()]) as checker,
    ):  # fmt: skip
        for end in (theirs, ours, sentence):
            end.close()  # so that each side sees the other end
        candidate.begin("candidate", {"program": program})
        checker.begin("checker", asdict(tests))
        try:
            words = receive(verdict)
            reason, detail = FailureReason(words["reason"]), words["detail"]
            if reason is FailureReason.ENDED:
                candidate.stop()
                reason, ending = _ended(candidate)
                detail = f"{detail}: {ending}"
        except (EOFError, BadMessage):
            reason, ending = _ended(checker)
            detail = f"the tests themselves: {ending}"
    return CodeResult(reason is FailureReason.PASSED, reason, detail)


def _ended(sandbox: Sandbox) -> tuple[FailureReason, str]:
    ending = sandbox.ending()
    timed_out = ending.stopped in ("wall", "cpu")
    return FailureReason.TIMED_OUT if timed_out else FailureReason.ENDED, str(ending)
