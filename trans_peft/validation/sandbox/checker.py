"""Inside, in a sandbox of its own: run tests against a program that lives in another sandbox.

No line of the program runs here. What the tests call is a `Remote`, which sends the arguments over
and gets plain values back, so that the comparison, and with it the verdict, is made where the
program has nothing to replace, read or end.

`assert f(x) == expected` compares floats, and lists and tuples of floats, within evalplus'
tolerance (`evalplus.eval`, release 0.3.1: rtol 1e-7, atol 1e-6).
"""

import ast
import builtins
import math
import os
import socket
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from typing import Any, NoReturn

from trans_peft.validation.sandbox.protocol import BadMessage, Stream, receive, send
from trans_peft.validation.sandbox.values import Unrepresentable, decode, encode

__all__ = ["FailureReason", "ask"]

_TESTS = "<tests>"
_EQUAL = "<equal>"  # no identifier, so no test can use or replace it
_RTOL, _ATOL = 1e-7, 1e-6
_ENDS_AN_ITERATION = (StopIteration, StopAsyncIteration)


class FailureReason(StrEnum):
    """Why code passed or did not."""

    PASSED = "passed"
    WRONG = "wrong"
    RAISED = "raised"
    ENDED = "ended"
    TIMED_OUT = "timed-out"
    UNREPRESENTABLE = "unrepresentable"


_Reference = str | list[Any]  # a name of the program's, or an object's number and type


class RemoteError(Exception):
    """An exception of the program's whose type is not one of Python's own."""


class _Fault(BaseException):
    """The program cannot have passed, whatever the tests make of it."""

    def __init__(self, reason: FailureReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def ask(job: Mapping[str, Any], fds: Sequence[int]) -> None:
    """Run `job["tests"]` and write the verdict, `{"reason", "detail"}`.

    `job["preamble"]` runs first; then each of `job["names"]` stands for the program's.
    """
    talk_fd, verdict_fd = fds
    with (
        os.fdopen(verdict_fd, "wb") as verdict,
        socket.socket(fileno=talk_fd) as talk,
        talk.makefile("rwb") as stream,
    ):
        program = _Program(stream)
        reason, detail = _judge(program, job["preamble"], job["names"], job["tests"])
        if program.fault:  # tests may have swallowed it
            reason, detail = program.fault.reason, str(program.fault)
        send(verdict, {"reason": reason, "detail": detail[:1000]})


def _judge(
    program: "_Program", preamble: str, names: list[str], tests: str
) -> tuple[FailureReason, str]:
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        program.wait_until_loaded()
        exec(compile(preamble, "<preamble>", "exec", dont_inherit=True), namespace)  # noqa: S102
        namespace |= {name: Remote(program, name) for name in names} | {_EQUAL: _equal}
        tree = _Tolerant(names).visit(ast.parse(tests, _TESTS))
        exec(compile(tree, _TESTS, "exec", dont_inherit=True), namespace)  # noqa: S102
    except _Fault as fault:
        return fault.reason, str(fault)
    except BaseException as error:
        wrong = isinstance(error, AssertionError) and error is not program.raised
        return (
            FailureReason.WRONG if wrong else FailureReason.RAISED,
            f"{_words(error)}{_place(error, tests)}",
        )
    return FailureReason.PASSED, ""


class _Tolerant(ast.NodeTransformer):
    """Lets `assert a == b`, also between `and`s, compare by `_equal`.

    The side that uses one of the program's names is what the program answered.
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
    """Return whether both are equal, or the answer is as close to what was expected as may be."""
    exact = first == second
    answer, expected = (second, first) if swapped else (first, second)
    if exact or type(answer) is not type(expected):
        return exact
    if isinstance(expected, float):
        return _close(answer, expected)
    if not isinstance(expected, (list, tuple)) or len(answer) != len(expected):
        return exact
    return all(map(_close, answer, expected))


def _close(answer: Any, expected: Any) -> bool:
    """Return what numpy's `allclose` says of a number and an expected float."""
    if not isinstance(expected, float) or not isinstance(answer, (int, float)):
        return False
    if not (math.isfinite(answer) and math.isfinite(expected)):
        return answer == expected
    return abs(answer - expected) <= _ATOL + _RTOL * abs(expected)


def _words(error: BaseException) -> str:
    name = "" if isinstance(error, RemoteError) else type(error).__name__
    return ": ".join(part for part in (name, str(error)) if part)


def _place(error: BaseException, tests: str) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    numbers = [frame.lineno or 0 for frame in frames if frame.filename == _TESTS]
    lines = dict(enumerate(tests.split("\n"), start=1))
    return f" at: {lines.get(numbers[-1], '').strip()}" if numbers else ""


class _Program:
    """The program in the other sandbox."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.fault: _Fault | None = None
        self.raised: Exception | None = None

    def wait_until_loaded(self) -> None:
        self._receive()

    def do(self, act: str, reference: _Reference, *arguments: Any) -> Any:
        try:
            parts = [encode(argument, _refer) for argument in arguments]
            send(self._stream, [act, ["object", reference], *parts])
        except (Unrepresentable, BadMessage) as error:
            self.blame(FailureReason.UNREPRESENTABLE, f"an argument of a call: {error}")
        except OSError:
            self.blame(FailureReason.ENDED, "the program ended before it was asked")
        return self._receive()

    def blame(self, reason: FailureReason, detail: str) -> NoReturn:
        self.fault = self.fault or _Fault(reason, detail)
        raise self.fault

    def _receive(self) -> Any:
        try:
            kind, *content = receive(self._stream)
            if kind == "value":
                (value,) = content
                return decode(value, self._remote)
            words = [str(word) for word in content]
        except (EOFError, OSError):
            self.blame(FailureReason.ENDED, "the program ended before it answered")
        except (BadMessage, ArithmeticError, LookupError, MemoryError, RecursionError, TypeError,
                ValueError) as error:  # fmt: skip
            self.blame(FailureReason.ENDED, f"the program sent what is no answer: {error!r}")
        if kind == "raised":
            self.raised = _exception(words[0] if words else "", ": ".join(words[1:]))
            raise self.raised
        self.blame(FailureReason.UNREPRESENTABLE, f"an answer: {': '.join(words)}")

    def _remote(self, reference: Any) -> "Remote":
        number, kind = reference
        return Remote(self, [int(number), str(kind)])


class Remote:
    """An object of the program's: it can be called, and its attributes read and set.

    Comparing it, or asking it anything else, would let the program's own code decide about the
    verdict: the check then fails as unrepresentable.
    """

    __slots__ = ("_program", "_reference")
    _program: _Program
    _reference: _Reference

    def __init__(self, program: _Program, reference: _Reference) -> None:
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_reference", reference)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._program.do("call", self._reference, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._program.do("get", self._reference, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.do("set", self._reference, name, value)

    def _refuse(self, *_: object) -> NoReturn:
        name = self._reference if isinstance(self._reference, str) else self._reference[1]
        detail = f"the tests compare or unpack {name}, which is no plain value"
        self._program.blame(FailureReason.UNREPRESENTABLE, detail)

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse
    __bool__ = __len__ = __iter__ = __contains__ = __getitem__ = _refuse


def _refer(value: Any) -> _Reference:
    if isinstance(value, Remote):
        return object.__getattribute__(value, "_reference")
    raise Unrepresentable(f"a value of type {type(value).__name__} cannot travel")


def _exception(name: str, text: str) -> Exception:
    """Return the program's exception as Python's own, unless that would end a loop of the tests.

    `all(map(f, values))` takes a StopIteration of f's for the end of the values, and passes.
    """
    kind = getattr(builtins, name, None)
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        return RemoteError(f"{name}: {text}")
    if not issubclass(kind, _ENDS_AN_ITERATION):
        with suppress(TypeError):  # some want more than a text
            return kind(text)
    return RemoteError(f"{name}: {text}")
