"""How much generated code may take, and how the kernel holds it to that."""

import resource
from dataclasses import dataclass
from math import ceil

from trans_peft.errors import InvalidSpecError

__all__ = ["Limits", "impose"]

_MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Upper bounds for one sandbox.

    `cpu_s` is processor time of one process, so that a verdict does not hang on how busy the
    machine is; `wall_s` is generous, for code that waits. `memory_bytes` is address space of one
    process, `processes` counts threads too: at worst a sandbox takes their product.
    `output_bytes` bounds stdout and stderr each, `scratch_bytes` the scratch folder and any file.
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
            problems.append("memory_bytes is below 64 MiB: Python itself does not start")
        if problems:
            raise InvalidSpecError(f"limits that cannot be: {'; '.join(problems)}")


_OPEN_FILES = 64


def impose(limits: Limits, *, others: int = 0) -> None:
    """Bind this process and its children. Without privileges, none of it can be raised again.

    `others` is how many processes outside the sandbox the kernel counts with those inside it.
    """
    for what, bound in (
        (resource.RLIMIT_CPU, ceil(limits.cpu_s)),
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_NPROC, limits.processes + others),
        (resource.RLIMIT_FSIZE, limits.scratch_bytes),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        _, hard = resource.getrlimit(what)
        if hard != resource.RLIM_INFINITY:
            bound = min(bound, hard)
        resource.setrlimit(what, (bound, bound))
