"""Runs inside a sandbox of its own: executes tests against a program in another sandbox.

No line of the program runs in this process. The tests call a `Remote`, which sends the arguments to
the other sandbox and receives plain values. The comparison, and so the verdict, is made where the
program can replace, read or end nothing.

`assert f(x) == expected` compares floats, and lists and tuples of floats, within evalplus'
tolerance (`evalplus.eval`, release 0.3.1: rtol 1e-7, atol 1e-6).
"""

import ast
import builtins
import math
import os
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from typing import Any, NoReturn

from trans_peft.sandbox.protocol import InvalidMessageError, Stream, receive, send
from trans_peft.sandbox.values import UnrepresentableError, decode, encode

__all__ = ["FailureReason", "run_tests"]

_TESTS = "<tests>"
_EQUAL = "<equal>"  # not an identifier, so that no test can use or replace it
_RTOL, _ATOL = 1e-7, 1e-6
_ENDS_AN_ITERATION = (StopIteration, StopAsyncIteration)


class FailureReason(StrEnum):
    """Why a program passed or failed its tests."""

    PASSED = "passed"
    WRONG = "wrong"  # an assertion of the tests failed
    RAISED = "raised"  # the program or the tests raised an exception
    ENDED = "ended"  # a process ended, or sent an invalid message
    TIMED_OUT = "timed-out"
    UNREPRESENTABLE = "unrepresentable"  # the tests need a value that cannot be sent


_Reference = str | list[Any]  # a name that the program defines, or an object's number and type


class RemoteError(Exception):
    """An exception of the program whose type is not one of Python's own."""


class _ProgramFailure(BaseException):
    """The program has failed. Tests that catch this exception do not change that."""

    def __init__(self, reason: FailureReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def run_tests(job: Mapping[str, Any], fds: Sequence[int]) -> None:
    """Run `job["tests"]` and write the verdict, `{"reason", "detail"}`, to the second descriptor.

    The first descriptor is the socket of the program's sandbox. `job["preamble"]` runs first. Each
    of `job["names"]` then refers to the program.
    """
    program_fd, verdict_fd = fds
    with (
        os.fdopen(verdict_fd, "wb") as verdict,
        socket.socket(fileno=program_fd) as sock,
        sock.makefile("rwb") as stream,
    ):
        program = _Program(stream)
        reason, detail = _evaluate(program, job["preamble"], job["names"], job["tests"])
        if program.failure:  # the tests may have caught it
            reason, detail = program.failure.reason, str(program.failure)
        send(verdict, {"reason": reason, "detail": detail[:1000]})


def _evaluate(
    program: "_Program", preamble: str, names: list[str], tests: str
) -> tuple[FailureReason, str]:
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        program.wait_until_loaded()
        exec(compile(preamble, "<preamble>", "exec", dont_inherit=True), namespace)  # noqa: S102
        namespace |= {name: Remote(program, name) for name in names} | {_EQUAL: _equal}
        tree = _TolerantAsserts(names).visit(ast.parse(tests, _TESTS))
        exec(compile(tree, _TESTS, "exec", dont_inherit=True), namespace)  # noqa: S102
    except _ProgramFailure as failure:
        return failure.reason, str(failure)
    except BaseException as error:
        wrong = isinstance(error, AssertionError) and error is not program.raised
        return (
            FailureReason.WRONG if wrong else FailureReason.RAISED,
            f"{_error_text(error)}{_failed_line(error, tests)}",
        )
    return FailureReason.PASSED, ""


class _TolerantAsserts(ast.NodeTransformer):
    """Replace `==` by `_equal` in `assert a == b` and `assert a == b and c == d`.

    The side that uses one of the program's names counts as the answer.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)

    def visit_Assert(self, node: ast.Assert) -> ast.Assert:
        node.test = self._tolerant(node.test)
        return node

    def _tolerant(self, test: ast.expr) -> ast.expr:
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            test.values = [self._tolerant(value) for value in test.values]
        elif isinstance(test, ast.Compare) and [type(op) for op in test.ops] == [ast.Eq]:
            sides = [test.left, *test.comparators]
            swapped = self._uses_program(sides[1]) and not self._uses_program(sides[0])
            call = ast.Call(ast.Name(_EQUAL, ast.Load()), [*sides, ast.Constant(swapped)], [])
            return ast.fix_missing_locations(ast.copy_location(call, test))
        return test

    def _uses_program(self, side: ast.expr) -> bool:
        return any(isinstance(n, ast.Name) and n.id in self._names for n in ast.walk(side))


def _equal(first: Any, second: Any, swapped: bool) -> Any:
    """Return whether an answer equals the expected value, floats within the tolerance.

    `first` is the answer, or `second` if `swapped`.
    """
    exact = first == second
    answer, expected = (second, first) if swapped else (first, second)
    if exact or type(answer) is not type(expected):
        return exact
    if isinstance(expected, float):
        return _is_close(answer, expected)
    if not isinstance(expected, (list, tuple)) or len(answer) != len(expected):
        return exact
    return all(map(_is_close, answer, expected))


def _is_close(answer: Any, expected: Any) -> bool:
    """Return what numpy's `allclose` returns for a number and an expected float."""
    if not isinstance(expected, float) or not isinstance(answer, (int, float)):
        return False
    if isinstance(answer, int) and abs(answer) > sys.float_info.max:
        return False
    if not (math.isfinite(answer) and math.isfinite(expected)):
        return answer == expected
    return abs(answer - expected) <= _ATOL + _RTOL * abs(expected)


def _error_text(error: BaseException) -> str:
    name = "" if isinstance(error, RemoteError) else type(error).__name__
    return ": ".join(part for part in (name, str(error)) if part)


def _failed_line(error: BaseException, tests: str) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    numbers = [frame.lineno or 0 for frame in frames if frame.filename == _TESTS]
    lines = dict(enumerate(tests.split("\n"), start=1))
    return f" at: {lines.get(numbers[-1], '').strip()}" if numbers else ""


class _Program:
    """The program in the other sandbox."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.failure: _ProgramFailure | None = None
        self.raised: Exception | None = None

    def wait_until_loaded(self) -> None:
        self._receive()

    def request(self, action: str, reference: _Reference, *arguments: Any) -> Any:
        try:
            parts = [encode(argument, _refer) for argument in arguments]
            send(self._stream, [action, ["object", reference], *parts])
        except (UnrepresentableError, InvalidMessageError) as error:
            self.fail(FailureReason.UNREPRESENTABLE, f"an argument of a call: {error}")
        except OSError:
            self.fail(FailureReason.ENDED, "the program ended before a call was sent")
        return self._receive()

    def fail(self, reason: FailureReason, detail: str) -> NoReturn:
        self.failure = self.failure or _ProgramFailure(reason, detail)
        raise self.failure

    def _receive(self) -> Any:
        try:
            kind, *content = receive(self._stream)
            if kind == "value":
                (value,) = content
                return decode(value, self._remote)
            texts = [str(part) for part in content]
        except (EOFError, OSError):
            self.fail(FailureReason.ENDED, "the program ended before it returned a value")
        except (InvalidMessageError, ArithmeticError, LookupError, MemoryError, RecursionError,
                TypeError, ValueError) as error:  # fmt: skip
            self.fail(FailureReason.ENDED, f"the program sent an invalid reply: {error!r}")
        if kind == "raised":
            self.raised = _exception(texts[0] if texts else "", ": ".join(texts[1:]))
            raise self.raised
        self.fail(FailureReason.UNREPRESENTABLE, f"a returned value: {': '.join(texts)}")

    def _remote(self, reference: Any) -> "Remote":
        number, kind = reference
        return Remote(self, [int(number), str(kind)])


class Remote:
    """An object in the program's sandbox, which can be called, and has attributes.

    Any other operation, such as a comparison, would let the program's code decide the verdict. The
    check then fails as unrepresentable.
    """

    __slots__ = ("_program", "_reference")
    _program: _Program
    _reference: _Reference

    def __init__(self, program: _Program, reference: _Reference) -> None:
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_reference", reference)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._program.request("call", self._reference, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._program.request("get", self._reference, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.request("set", self._reference, name, value)

    def _refuse(self, *_: object) -> NoReturn:
        name = self._reference if isinstance(self._reference, str) else self._reference[1]
        detail = f"the tests compare or unpack {name}, which is not a plain value"
        self._program.fail(FailureReason.UNREPRESENTABLE, detail)

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse
    __bool__ = __len__ = __iter__ = __contains__ = __getitem__ = _refuse


def _refer(value: Any) -> _Reference:
    if isinstance(value, Remote):
        return object.__getattribute__(value, "_reference")
    raise UnrepresentableError(f"a value of type {type(value).__name__} cannot be sent")


def _exception(name: str, text: str) -> Exception:
    """Return the program's exception as one of Python's own types where that is safe.

    A StopIteration of `f` would end `all(map(f, values))` early and let the test pass.
    """
    kind = getattr(builtins, name, None)
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        return RemoteError(f"{name}: {text}")
    if not issubclass(kind, _ENDS_AN_ITERATION):
        with suppress(TypeError):  # some types need more arguments than a text
            return kind(text)
    return RemoteError(f"{name}: {text}")
