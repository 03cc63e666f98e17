"""Limits on one isolated call, and how a child process sets them in the kernel."""

import math
import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CallLimits", "is_memory_limit_error"]

_MIB = 1 << 20
_GIB = 1 << 30


@dataclass(frozen=True)
class CallLimits:
    """What one isolated call may use. ValueError for a limit that is not positive.

    Attributes:
        cpu_s: processor time of all threads together, in seconds. Make it the limit that is reached
            first, because it does not depend on how busy the machine is.
        wall_s: elapsed time in seconds, for a call that sleeps or waits.
        memory_bytes: private writable memory (RLIMIT_DATA) in addition to what the interpreter and
            its imported modules occupy. Enforced on Linux only.
        result_bytes: size of the result as JSON.
        file_bytes: size of each file that the call writes.
    """

    cpu_s: float = 60.0
    wall_s: float = 600.0
    memory_bytes: int = 2 * _GIB
    result_bytes: int = 256 * _MIB
    file_bytes: int = 64 * _MIB

    def __post_init__(self) -> None:
        not_positive = [name for name, value in vars(self).items() if not value > 0]
        if not_positive:
            raise ValueError(f"limits must be positive: {', '.join(not_positive)}")

    def apply(self) -> None:
        """Set these limits for this process, except `wall_s`, which its parent enforces."""
        _set(resource.RLIMIT_CORE, 0)
        _set(resource.RLIMIT_FSIZE, self.file_bytes)
        _set(resource.RLIMIT_CPU, math.ceil(self.cpu_s))
        # RLIMIT_AS would also count the address space that torch and CUDA reserve and never use.
        if (used := _data_bytes()) is not None:
            _set(resource.RLIMIT_DATA, used + self.memory_bytes)


def _set(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    with suppress(OSError, ValueError):  # a limit that this system does not support
        resource.setrlimit(kind, (value, value if kind != resource.RLIMIT_CPU else hard))


def _data_bytes() -> int | None:
    """Return this process's private writable memory in bytes. None on a system without /proc."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return None


_OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",  # torch
    "cannot allocate memory",  # the C library
    "std::bad_alloc",  # pyarrow
    "can't start new thread",  # Python, if the thread's stack exceeds the limit
)


def is_memory_limit_error(error: BaseException) -> bool:
    """Return whether an error of a child process means that its memory limit was reached."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(part in text for part in _OUT_OF_MEMORY_TEXTS)
