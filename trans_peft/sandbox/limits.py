"""How much time, memory and output a program may use, and the kernel limits that enforce it."""

import resource
from dataclasses import dataclass
from math import ceil

from trans_peft.sandbox.errors import InvalidLimitsError

__all__ = ["SandboxLimits", "set_limits"]

_MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class SandboxLimits:
    """Upper bounds for one sandbox. InvalidLimitsError for bounds that no program can meet.

    At worst a sandbox uses `processes` times `memory_bytes`, plus `scratch_bytes`.

    Attributes:
        wall_s: elapsed time in seconds, for a program that waits. Leave it much larger than
            `cpu_s`, so that a busy machine changes no result.
        cpu_s: processor time of one process in seconds.
        memory_bytes: address space of one process, at least 64 MiB.
        processes: number of processes and threads.
        output_bytes: size of stdout, and of stderr.
        scratch_bytes: size of the scratch folder, and of any file.
    """

    wall_s: float = 60.0
    cpu_s: float = 10.0
    memory_bytes: int = 512 * _MEBIBYTE
    processes: int = 4
    output_bytes: int = _MEBIBYTE
    scratch_bytes: int = 16 * _MEBIBYTE

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be above 0, not {value}"
            for name, value in vars(self).items()
            if not value > 0
        ]
        if self.memory_bytes < 64 * _MEBIBYTE:
            problems.append("memory_bytes must be at least 64 MiB, which Python needs to start")
        if problems:
            raise InvalidLimitsError(f"invalid limits: {'; '.join(problems)}")


_OPEN_FILES = 64


def set_limits(limits: SandboxLimits, *, other_processes: int = 0) -> None:
    """Set the kernel's limits for this process and its children.

    A process without privileges cannot raise them again. `other_processes` is the number of
    processes outside the sandbox that the kernel counts together with those inside it.
    """
    for kind, bound in (
        (resource.RLIMIT_CPU, ceil(limits.cpu_s)),
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_NPROC, limits.processes + other_processes),
        (resource.RLIMIT_FSIZE, limits.scratch_bytes),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            bound = min(bound, hard)
        resource.setrlimit(kind, (bound, bound))
