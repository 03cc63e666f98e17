"""The few doors to the Linux kernel that Python 3.11 does not have, through ctypes and libc.

Each raises OSError with the call's name. Python 3.12 has `os.unshare`; mount, prctl and capset it
has not either. See namespaces(7), mount_setattr(2), pivot_root(2), capabilities(7), prctl(2).
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
    "allow_no_debugger",
    "bind",
    "die_with_parent",
    "drop_capabilities",
    "forget_keys",
    "gain_no_privileges",
    "install_filter",
    "make_read_only",
    "mount_tmpfs",
    "move_root",
    "numbers",
    "receive_no_mounts_back",
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
    """The numbers of calls without a wrapper in libc, and the architecture's name in audit.h."""

    audit: int
    pivot_root: int
    mount_setattr: int
    keyctl: int


_NUMBERS = {
    "x86_64": _Numbers(audit=0xC000003E, pivot_root=155, mount_setattr=442, keyctl=250),
    "aarch64": _Numbers(audit=0xC00000B7, pivot_root=41, mount_setattr=442, keyctl=219),
}


def numbers() -> _Numbers:
    """Return this machine's numbers; OSError on an architecture that nobody has looked up."""
    machine = platform.machine()
    if machine not in _NUMBERS:
        raise OSError(f"no system call numbers are known here for {machine}")
    return _NUMBERS[machine]


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int | bytes | ctypes.Array | None) -> None:
    # As longs: the kernel reads whole registers, and ctypes would pass an int in half of one.
    words = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    if getattr(_libc(), name)(*words) == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def unshare(flags: int) -> None:
    """Leave the caller's namespaces for new ones (`CLONE_NEW...`)."""
    _call("unshare", flags)


def receive_no_mounts_back() -> None:
    """Keep this namespace's mounts from reaching any other."""
    _call("mount", b"none", b"/", None, _MS_REC | _MS_SLAVE, None)


def mount_tmpfs(path: str, options: str, *, executable: bool = True) -> None:
    """Mount an empty folder in memory; `options` as in tmpfs(5)."""
    flags = _MS_NOSUID | _MS_NODEV | (0 if executable else _MS_NOEXEC)
    _call("mount", b"tmpfs", os.fsencode(path), b"tmpfs", flags, options.encode())


def bind(source: str, target: str) -> None:
    """Let `target` show what `source` shows, with everything mounted below it."""
    flags = _MS_BIND | _MS_REC
    _call("mount", os.fsencode(source), os.fsencode(target), None, flags, None)


def make_read_only(path: str) -> None:
    """Make a mount and everything mounted below it read-only, and its set-uid bits void."""
    attributes = struct.pack("QQQQ", _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    number = numbers().mount_setattr
    _call(
        "syscall", number, _AT_FDCWD, os.fsencode(path), _AT_RECURSIVE, attributes, len(attributes)
    )


def move_root(path: str) -> None:
    """Make the mount at `path` the root, and let go of the old one."""
    os.chdir(path)
    _call("syscall", numbers().pivot_root, b".", b".")
    _call("umount2", b".", _MNT_DETACH)
    os.chdir("/")


def forget_keys() -> None:
    """Leave the caller's session keyring (Kerberos tickets may lie there) for an empty one."""
    _call("syscall", numbers().keyctl, _KEYCTL_JOIN_SESSION_KEYRING, None)


def die_with_parent() -> None:
    """Ask for SIGKILL when the parent ends. The kernel forgets it when ids change."""
    _call("prctl", _PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)


def allow_no_debugger() -> None:
    """Let no process of the same user trace this one or read its memory."""
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)


def gain_no_privileges() -> None:
    """Let no program that this process starts have more privileges than itself."""
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def drop_capabilities() -> None:
    """Give up every capability; with `gain_no_privileges` before it, for good."""
    _call("capset", struct.pack("Ii", _LINUX_CAPABILITY_VERSION_3, 0), bytes(24))


def install_filter(program: bytes) -> None:
    """Install a classic BPF filter (instructions of 8 bytes) in front of every system call."""
    code = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    _call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, fprog, 0, 0)
