"""The system calls that generated code has no business with, refused by a seccomp filter.

Namespaces keep it apart from the machine; this keeps it from what they do not cover: sockets of
families that have no namespace (vsock reaches the host of a virtual machine), memory that no limit
counts (System V, memfd), and the parts of the kernel in which most holes were found (io_uring, bpf,
further namespaces, tracing, keys). What is not listed is allowed: Python needs the rest.
See seccomp(2) and the kernel's Documentation/userspace-api/seccomp_filter.rst.
"""

import errno
import struct

from trans_peft.validation.sandbox.kernel import CLONE_NEWUSER, install_filter, numbers

__all__ = ["forbid_system_calls", "forbid_to_outlive"]

# name: (x86_64, aarch64), from the kernel's unistd headers.
_REFUSED = {
    "socket": (41, 198),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "fsopen": (430, 430),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
}
_CLONE3 = 435
# Refused for a first argument only: one that has this bit, one that is this number.
_CLONE, _PRCTL = (56, 220), (157, 167)
_PR_SET_PDEATHSIG = 1
_ARCHITECTURES = {0xC000003E: 0, 0xC00000B7: 1}
_X32 = 0x40000000  # x86_64's second set of numbers, by which the first could be passed by

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def _do(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("HBBI", code, then, otherwise, value)


_REFUSE = _do(_RETURN, _ERRNO | errno.EPERM)


def forbid_system_calls() -> None:
    """Refuse them with EPERM from now on, here and in all children. OSError where that fails."""
    column = _ARCHITECTURES[numbers().audit]
    rules = [
        # Its flags lie in memory that a filter cannot read; libc goes back to clone on ENOSYS.
        *(_do(_EQUAL, _CLONE3, 0, 1), _do(_RETURN, _ERRNO | errno.ENOSYS)),
    ]
    for call in _REFUSED.values():
        rules += [_do(_EQUAL, call[column], 0, 1), _REFUSE]
    _install([*rules, *_first_argument(_CLONE[column], _ANY_BIT, CLONE_NEWUSER)])


def forbid_to_outlive() -> None:
    """Refuse to take back `kernel.die_with_parent`. OSError where that fails."""
    _install(_first_argument(_PRCTL[_ARCHITECTURES[numbers().audit]], _EQUAL, _PR_SET_PDEATHSIG))


def _first_argument(call: int, test: int, value: int) -> list[bytes]:
    return [
        _do(_EQUAL, call, 0, 3),
        _do(_LOAD, _FIRST_ARGUMENT_AT),
        *(_do(test, value, 0, 1), _REFUSE),
    ]


def _install(rules: list[bytes]) -> None:
    start = [
        _do(_LOAD, _ARCHITECTURE_AT),
        _do(_EQUAL, numbers().audit, 1, 0),
        _do(_RETURN, _KILL),
        _do(_LOAD, _NUMBER_AT),
        *(_do(_AT_LEAST, _X32, 0, 1), _REFUSE),
    ]
    install_filter(b"".join([*start, *rules, _do(_RETURN, _ALLOW)]))
