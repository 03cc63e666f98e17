"""What stands between generated code and the machine, each guard by name and in words.

A guard is tried, never guessed: every start of a sandbox raises all of them, and runs no code where
one failed that the caller has not named (`trans_peft.validation.sandbox.run`). Limits on time,
memory, files and output, and the loss of every privilege, are to be had on any Linux: they are no
guards to be missing, but errors.
"""

from collections.abc import Collection, Mapping, Set
from enum import StrEnum

from trans_peft.errors import EvaluationError, InvalidSpecError

__all__ = ["Guard", "guards_named", "refuse"]


class Guard(StrEnum):
    """One guard; its value is its name in messages and settings."""

    USER = "user"
    FILES = "files"
    PROCESSES = "processes"
    NETWORK = "network"
    IPC = "ipc"
    SYSTEM_CALLS = "system-calls"

    @property
    def words(self) -> str:
        """What it does, and by which means of the kernel."""
        return _WORDS[self]


_WORDS = {
    Guard.USER: "runs as nobody, with its processes counted (user namespace)",
    Guard.FILES: "sees only Python, read-only, and a scratch folder (mount namespace)",
    Guard.PROCESSES: "sees only its own processes, all of which end with it (pid namespace)",
    Guard.NETWORK: "has no network (network namespace)",
    Guard.IPC: "shares no memory and no message queue (ipc namespace)",
    Guard.SYSTEM_CALLS: "opens no socket and reaches little of the kernel (seccomp filter)",
}


def guards_named(names: Collection[str]) -> frozenset[Guard]:
    """Return the guards with these names. InvalidSpecError for a name that is none of them."""
    unknown = sorted({*names} - {*map(str, Guard)})
    if unknown:
        raise InvalidSpecError(
            "the sandbox has no such guard", expected=", ".join(Guard), found=", ".join(unknown)
        )
    return frozenset(map(Guard, names))


def refuse(missing: Mapping[Guard, str], allowed: Set[Guard]) -> None:
    """Raise EvaluationError, naming every guard that is missing and not allowed to be."""
    wanted = {guard: why for guard, why in missing.items() if guard not in allowed}
    if not wanted:
        return
    names = ", ".join(f"Guard.{guard.name}" for guard in sorted({*wanted, *allowed}))
    raise EvaluationError(
        "this machine lacks guards without which generated code is not run; nothing was run",
        expected="\n    ".join(("", *(f"{guard}: {guard.words}" for guard in wanted))),
        found="\n    ".join(("", *(f"{guard}: {why}" for guard, why in wanted.items()))),
        do="run it where unprivileged user namespaces are allowed (in Docker: a seccomp profile "
        "that allows unshare and mount; Linux 5.14 or later). Only where the machine is thrown "
        "away afterwards: the operator of a worker sets TRANS_PEFT_SANDBOX_MAY_LACK="
        f"{','.join(sorted({*wanted, *allowed}))} and the suite names these guards after a + "
        f"(in Python: allow_missing=frozenset({{{names}}}))",
    )
