"""The guards that separate a program from the machine.

Every start of a sandbox sets up all guards. A guard counts as present only after the kernel
accepted every step of it. Limits on time, memory, files and output, and the loss of all privileges,
work on every Linux. They are not guards: the sandbox fails where one of them cannot be set.
"""

from collections.abc import Mapping, Set
from enum import StrEnum

from trans_peft.sandbox.errors import SandboxError

__all__ = ["MACHINE_REQUIREMENTS", "Guard", "MissingGuardsError", "require_guards"]

MACHINE_REQUIREMENTS = (
    "run on Linux 5.14 or later with unprivileged user namespaces "
    "(in Docker: with a seccomp profile that allows unshare and mount)"
)
"""What a machine needs for all guards, as an instruction for error messages."""


class Guard(StrEnum):
    """One guard. Its value is its name in messages and settings."""

    USER = "user"
    FILES = "files"
    PROCESSES = "processes"
    NETWORK = "network"
    IPC = "ipc"
    SYSTEM_CALLS = "system-calls"

    @property
    def description(self) -> str:
        """What the guard does, and the kernel feature that it uses."""
        return _DESCRIPTIONS[self]


_DESCRIPTIONS = {
    Guard.USER: "the program runs as nobody, and its processes are counted (user namespace)",
    Guard.FILES: "the program sees Python, read-only, and a scratch folder (mount namespace)",
    Guard.PROCESSES: "the program sees only its own processes, which end with it (pid namespace)",
    Guard.NETWORK: "the program has no network (network namespace)",
    Guard.IPC: "the program shares no memory and no message queue (ipc namespace)",
    Guard.SYSTEM_CALLS: "the program opens no socket and reaches little of the kernel (seccomp)",
}


class MissingGuardsError(SandboxError, RuntimeError):
    """This machine lacks guards, and the caller did not allow that. No program was run.

    Attributes:
        missing: each guard that is missing without permission, and why it is missing.
        allowed: the guards that the caller allowed to be missing.
    """

    def __init__(self, missing: Mapping[Guard, str], allowed: Set[Guard]) -> None:
        self.missing, self.allowed = missing, allowed
        names = ", ".join(f"Guard.{guard.name}" for guard in sorted({*missing, *allowed}))
        super().__init__(
            "this machine lacks guards for programs that a model wrote; no program was run",
            expected="\n    ".join(("", *(f"{each}: {each.description}" for each in missing))),
            found="\n    ".join(("", *(f"{each}: {why}" for each, why in missing.items()))),
            do=f"{MACHINE_REQUIREMENTS}, or pass allow_missing=frozenset({{{names}}}) "
            "on a machine that is discarded afterwards",
        )


def require_guards(missing: Mapping[Guard, str], allowed: Set[Guard]) -> None:
    """Raise MissingGuardsError if a guard is missing that is not in `allowed`."""
    refused = {guard: why for guard, why in missing.items() if guard not in allowed}
    if refused:
        raise MissingGuardsError(refused, allowed)
