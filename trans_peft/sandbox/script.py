"""Runs inside a sandbox: executes a program as a script."""

import os
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

__all__ = ["run"]


def run(job: Mapping[str, Any], fds: Sequence[int]) -> None:
    """Run `job["program"]` as `__main__`, with `fds` as its stdout and stderr."""
    for fd, standard in zip(fds, (1, 2), strict=True):
        os.dup2(fd, standard)
        os.close(fd)
    module = sys.modules["__main__"] = ModuleType("__main__")
    try:
        exec(compile(job["program"], "<program>", "exec", dont_inherit=True), module.__dict__)  # noqa: S102
    except Exception as error:
        own = error.__traceback__.tb_next if error.__traceback__ else None
        sys.excepthook(type(error), error.with_traceback(own), own)
        sys.exit(1)
