"""Run a program in a sandbox and keep what it wrote: for a look, never for a verdict."""

import os
import selectors
from collections.abc import Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache

from trans_peft.validation.sandbox.guards import Guard
from trans_peft.validation.sandbox.limits import Limits
from trans_peft.validation.sandbox.process import ProcessExit, Sandbox

__all__ = ["RunResult", "missing_guards", "run_code"]

_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class RunResult:
    """What a program did: how it ended, and the first `Limits.output_bytes` of what it wrote."""

    ending: ProcessExit
    stdout: str
    stderr: str


def run_code(
    program: str,
    *,
    limits: Limits = Limits(),  # noqa: B008  frozen
    allow_missing: Set[Guard] = frozenset(),
) -> RunResult:
    """Run a Python program (its text) as a script in a sandbox of its own, standard library only.

    An exit code of 0 says that the program ended with 0, never that it is right
    (`trans_peft.validation.sandbox.check`). EvaluationError where this machine lacks a guard that
    is not in `allow_missing`; then nothing was run.
    """
    with ExitStack() as stack:
        readers, writers = [], []
        for _ in ("stdout", "stderr"):
            read_fd, write_fd = os.pipe()
            readers.append(stack.enter_context(os.fdopen(read_fd, "rb", buffering=0)))
            writers.append(stack.enter_context(os.fdopen(write_fd, "wb", buffering=0)))
        fds = [writer.fileno() for writer in writers]
        sandbox = stack.enter_context(Sandbox(limits, allow_missing, fds))
        for writer in writers:
            writer.close()
        sandbox.begin("script", {"program": program})
        kept = {reader.fileno(): bytearray() for reader in readers}
        overflown = _read(sandbox, kept, limits.output_bytes)
        if overflown:
            sandbox.stop()
        ending = sandbox.ending()
    stdout, stderr = (
        data[: limits.output_bytes].decode(errors="replace") for data in kept.values()
    )
    return RunResult(replace(ending, stopped="output") if overflown else ending, stdout, stderr)


def _read(sandbox: Sandbox, kept: Mapping[int, bytearray], limit_bytes: int) -> bool:
    """Read until the code has ended; return True at once where it writes too much."""
    with selectors.DefaultSelector() as selector:
        for source in (sandbox.fileno(), *kept):
            selector.register(source, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in selector.select()}
            for fd in ready & kept.keys():
                chunk = os.read(fd, _CHUNK_BYTES)
                kept[fd] += chunk
                if len(kept[fd]) > limit_bytes:
                    return True
                if not chunk:
                    selector.unregister(fd)
            if ready == {sandbox.fileno()}:  # and nothing is left that was written before
                return False


@cache
def missing_guards() -> Mapping[Guard, str]:
    """Return which guards this machine lacks, and what the kernel said. Tried once a process."""
    return run_code("", allow_missing=frozenset(Guard)).ending.missing
