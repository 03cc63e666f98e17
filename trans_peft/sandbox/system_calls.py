"""Refuse system calls that generated programs do not need, with a seccomp filter.

Namespaces isolate the program from the machine. The filter covers what namespaces do not: sockets
of families that have no namespace (vsock reaches the host of a virtual machine), memory that no
limit counts (System V, memfd), and the parts of the kernel with the most vulnerabilities (io_uring,
bpf, nested namespaces, tracing, keys). Calls that are not listed are allowed, because Python needs
them. See seccomp(2) and the kernel's Documentation/userspace-api/seccomp_filter.rst.
"""

import errno
import struct

from trans_peft.sandbox.kernel import CLONE_NEWUSER, install_filter, numbers

__all__ = ["forbid_pdeathsig_changes", "forbid_system_calls"]

# Name: (number on x86_64, number on aarch64), from the kernel's unistd headers.
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
# Refused only for some first arguments: clone with CLONE_NEWUSER, prctl with PR_SET_PDEATHSIG.
_CLONE, _PRCTL = (56, 220), (157, 167)
_PR_SET_PDEATHSIG = 1
_ARCHITECTURES = {0xC000003E: 0, 0xC00000B7: 1}
_X32 = 0x40000000  # x86_64's second set of numbers, which would bypass the rules

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def _instruction(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("HBBI", code, then, otherwise, value)


_REFUSE = _instruction(_RETURN, _ERRNO | errno.EPERM)


def forbid_system_calls() -> None:
    """Make the listed calls fail with EPERM in this process and its children.

    OSError if the filter cannot be installed.
    """
    column = _ARCHITECTURES[numbers().audit]
    rules = [
        # A filter cannot read clone3's flags, which are in memory. On ENOSYS, libc uses clone.
        *(_instruction(_EQUAL, _CLONE3, 0, 1), _instruction(_RETURN, _ERRNO | errno.ENOSYS)),
    ]
    for call in _REFUSED.values():
        rules += [_instruction(_EQUAL, call[column], 0, 1), _REFUSE]
    _install([*rules, *_refuse_first_argument(_CLONE[column], _ANY_BIT, CLONE_NEWUSER)])


def forbid_pdeathsig_changes() -> None:
    """Forbid this process to undo `kernel.set_parent_death_signal`. OSError on failure."""
    _install(
        _refuse_first_argument(_PRCTL[_ARCHITECTURES[numbers().audit]], _EQUAL, _PR_SET_PDEATHSIG)
    )


def _refuse_first_argument(call: int, test: int, value: int) -> list[bytes]:
    return [
        _instruction(_EQUAL, call, 0, 3),
        _instruction(_LOAD, _FIRST_ARGUMENT_AT),
        *(_instruction(test, value, 0, 1), _REFUSE),
    ]


def _install(rules: list[bytes]) -> None:
    start = [
        _instruction(_LOAD, _ARCHITECTURE_AT),
        _instruction(_EQUAL, numbers().audit, 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER_AT),
        *(_instruction(_AT_LEAST, _X32, 0, 1), _REFUSE),
    ]
    install_filter(b"".join([*start, *rules, _instruction(_RETURN, _ALLOW)]))
