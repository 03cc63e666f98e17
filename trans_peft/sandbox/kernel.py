"""Linux system calls that Python 3.11 does not offer, called through ctypes and libc.

Each function raises OSError with the name of the call. Python 3.12 adds `os.unshare`, but neither
mount, prctl nor capset. See namespaces(7), mount_setattr(2), pivot_root(2), capabilities(7) and
prctl(2).
"""

import ctypes
import os
import platform
import struct
from functools import cache
from typing import NamedTuple

__all__ = [
    "CLONE_NEWIPC",
    "CLONE_NEWNET",
    "CLONE_NEWNS",
    "CLONE_NEWPID",
    "CLONE_NEWUSER",
    "bind",
    "drop_capabilities",
    "forbid_tracing",
    "install_filter",
    "leave_session_keyring",
    "make_mounts_private",
    "make_read_only",
    "mount_tmpfs",
    "numbers",
    "pivot_root",
    "set_no_new_privileges",
    "set_parent_death_signal",
    "unshare",
]

CLONE_NEWNS = 0x00020000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MS_BIND, _MS_REC, _MS_SLAVE = 4096, 16384, 1 << 19
_MNT_DETACH = 2
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 1, 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP = 1, 4, 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_SIGKILL = 9
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_KEYCTL_JOIN_SESSION_KEYRING = 1


class _Numbers(NamedTuple):
    """System calls without a wrapper in libc, and the architecture's constant in audit.h."""

    audit: int
    pivot_root: int
    mount_setattr: int
    keyctl: int


_NUMBERS = {
    "x86_64": _Numbers(audit=0xC000003E, pivot_root=155, mount_setattr=442, keyctl=250),
    "aarch64": _Numbers(audit=0xC00000B7, pivot_root=41, mount_setattr=442, keyctl=219),
}


def numbers() -> _Numbers:
    """Return this machine's numbers. OSError on an architecture that is not in the table."""
    machine = platform.machine()
    if machine not in _NUMBERS:
        supported = ", ".join(_NUMBERS)
        raise OSError(f"the sandbox has no system call numbers for {machine}, only {supported}")
    return _NUMBERS[machine]


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int | bytes | ctypes.Array | None) -> None:
    # The kernel reads whole registers; ctypes would pass an int in half of one.
    values = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    if getattr(_libc(), name)(*values) == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def unshare(flags: int) -> None:
    """Move this process into new namespaces; `flags` are `CLONE_NEW...`."""
    _call("unshare", flags)


def make_mounts_private() -> None:
    """Keep mounts of this namespace from propagating to any other."""
    _call("mount", b"none", b"/", None, _MS_REC | _MS_SLAVE, None)


def mount_tmpfs(path: str, options: str, *, executable: bool = True) -> None:
    """Mount an empty folder in memory. `options` are those of tmpfs(5)."""
    flags = _MS_NOSUID | _MS_NODEV | (0 if executable else _MS_NOEXEC)
    _call("mount", b"tmpfs", os.fsencode(path), b"tmpfs", flags, options.encode())


def bind(source: str, target: str) -> None:
    """Mount `source` at `target` too, with everything mounted below it."""
    flags = _MS_BIND | _MS_REC
    _call("mount", os.fsencode(source), os.fsencode(target), None, flags, None)


def make_read_only(path: str) -> None:
    """Make a mount and all mounts below it read-only, and ignore their set-uid bits."""
    attributes = struct.pack("QQQQ", _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    number = numbers().mount_setattr
    _call(
        "syscall", number, _AT_FDCWD, os.fsencode(path), _AT_RECURSIVE, attributes, len(attributes)
    )


def pivot_root(path: str) -> None:
    """Make the mount at `path` the root, and unmount the old root."""
    os.chdir(path)
    _call("syscall", numbers().pivot_root, b".", b".")
    _call("umount2", b".", _MNT_DETACH)
    os.chdir("/")


def leave_session_keyring() -> None:
    """Replace the caller's session keyring, which may hold Kerberos tickets, by an empty one."""
    _call("syscall", numbers().keyctl, _KEYCTL_JOIN_SESSION_KEYRING, None)


def set_parent_death_signal() -> None:
    """Let the kernel send SIGKILL when the parent ends. A change of ids cancels this."""
    _call("prctl", _PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)


def forbid_tracing() -> None:
    """Forbid other processes of the same user to trace this one or to read its memory."""
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)


def set_no_new_privileges() -> None:
    """Forbid programs that this process starts to gain privileges, as set-uid programs do."""
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def drop_capabilities() -> None:
    """Give up every capability, irrevocably after `set_no_new_privileges`."""
    _call("capset", struct.pack("Ii", _LINUX_CAPABILITY_VERSION_3, 0), bytes(24))


def install_filter(program: bytes) -> None:
    """Install a classic BPF filter (instructions of 8 bytes) in front of every system call."""
    code = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    _call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, fprog, 0, 0)
