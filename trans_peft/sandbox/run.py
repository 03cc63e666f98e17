"""Run a program as a script in a sandbox and return its output. The output is not a verdict."""

import os
import selectors
from collections.abc import Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache

from trans_peft.sandbox.guards import Guard
from trans_peft.sandbox.limits import SandboxLimits
from trans_peft.sandbox.process import ProcessExit, Sandbox

__all__ = ["RunResult", "missing_guards", "run_script"]

_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class RunResult:
    """What a program did.

    Attributes:
        exit: how it ended. Exit code 0 does not mean that the program is right.
        stdout: the first `SandboxLimits.output_bytes` of what it wrote there, decoded.
        stderr: the same of stderr.
    """

    exit: ProcessExit
    stdout: str
    stderr: str


def run_script(
    program: str,
    limits: SandboxLimits = SandboxLimits(),  # noqa: B008  frozen
    allow_missing: Set[Guard] = frozenset(),
) -> RunResult:
    """Run the text of a Python program, which can import the standard library only.

    MissingGuardsError if this machine lacks a guard that is not in `allow_missing`; then no program
    was run. SandboxFailedError.
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
        sandbox.start("script", {"program": program})
        output = {reader.fileno(): bytearray() for reader in readers}
        exceeded = _read(sandbox, output, limits.output_bytes)
        if exceeded:
            sandbox.terminate()
        ended = sandbox.wait()
    stdout, stderr = (
        data[: limits.output_bytes].decode(errors="replace") for data in output.values()
    )
    return RunResult(replace(ended, stopped_by="output") if exceeded else ended, stdout, stderr)


def _read(sandbox: Sandbox, output: Mapping[int, bytearray], limit_bytes: int) -> bool:
    """Read until the program has ended. Return True as soon as a stream exceeds the limit."""
    with selectors.DefaultSelector() as selector:
        for source in (sandbox.fileno(), *output):
            selector.register(source, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in selector.select()}
            for fd in ready & output.keys():
                chunk = os.read(fd, _CHUNK_BYTES)
                output[fd] += chunk
                if len(output[fd]) > limit_bytes:
                    return True
                if not chunk:
                    selector.unregister(fd)
            if ready == {sandbox.fileno()}:  # all output that was written before has been read
                return False


@cache
def missing_guards() -> Mapping[Guard, str]:
    """Return the guards that this machine lacks, each with the kernel's error.

    The first call in a process starts a sandbox to find out; later calls return the same result.
    """
    return run_script("", allow_missing=frozenset(Guard)).exit.missing
