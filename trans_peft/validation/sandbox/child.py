"""The sandbox's own process: it raises the guards, lets the code run in a child, and ends it.

`trans_peft.validation.sandbox.forkserver` starts an interpreter with an empty environment, which
forks one such process for each sandbox. It leaves the caller's namespaces, says what it could not
leave, waits for its order, and forks. The child becomes nobody and does the job; it is the first
process of its pid namespace, so that the kernel kills whatever it started when it ends, daemons
included. This process stays outside that namespace, where the child cannot reach it. It ends the
child when time is up, and when its own caller ends: the kernel closes their socket however that
happened.
"""

import json
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trans_peft.validation.sandbox import candidate, checker, kernel, script
from trans_peft.validation.sandbox.guards import Guard
from trans_peft.validation.sandbox.limits import Limits, impose
from trans_peft.validation.sandbox.root import SCRATCH, enter_private_root
from trans_peft.validation.sandbox.system_calls import forbid_system_calls, forbid_to_outlive

__all__ = ["NOBODY", "main"]

NOBODY = 65534
_MOST_FDS = 8

_NAMESPACES = {
    Guard.USER: kernel.CLONE_NEWUSER,  # first: it gives the right to leave the others
    Guard.FILES: kernel.CLONE_NEWNS,
    Guard.PROCESSES: kernel.CLONE_NEWPID,
    Guard.NETWORK: kernel.CLONE_NEWNET,
    Guard.IPC: kernel.CLONE_NEWIPC,
}
_ROLES = {"script": script.run, "candidate": candidate.answer, "checker": checker.ask}


def main(nursery_fd: int) -> None:
    """Fork a sandbox for each set of descriptors that comes in, until the socket ends."""
    nursery = socket.socket(fileno=nursery_fd)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    while True:
        data, fds, _, _ = socket.recv_fds(nursery, 1, _MOST_FDS)
        if not data:
            return
        if os.fork() == 0:
            nursery.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            _serve(socket.socket(fileno=fds[0]), fds[1:])
            os._exit(0)
        for fd in fds:
            os.close(fd)


def _serve(caller: socket.socket, fds: list[int]) -> None:
    """Serve one caller once: one JSON object a line, `_raise_and_run`'s the last."""
    lines, own_pid = caller.makefile("rwb"), os.getpid()

    def say(words: Mapping[str, Any]) -> None:
        lines.write(json.dumps(words).encode() + b"\n")
        lines.flush()

    try:
        missing: dict[str, str] = {}
        for guard, flag in _NAMESPACES.items():
            _attempt(guard, missing, kernel.unshare, flag)
        say({"missing": missing, "pid": own_pid})
        order = lines.readline()
        if order:  # no order: the caller will not have it without them
            say(_raise_and_run(json.loads(order), caller, fds))
    except Exception:
        if os.getpid() != own_pid:  # the child's, which is to have its traceback
            raise
        say({"error": traceback.format_exc()})


def _attempt(
    guard: Guard, missing: dict[str, str], step: Callable[..., None], *arguments: object
) -> None:
    try:
        step(*arguments)
    except OSError as error:
        missing[guard.value] = error.strerror or str(error)


def _raise_and_run(
    order: Mapping[str, Any], caller: socket.socket, fds: list[int]
) -> Mapping[str, Any]:
    limits = Limits(**order["limits"])
    missing: dict[str, str] = order["missing"]
    with suppress(OSError):  # where memory runs out, the system is to take this and not the caller
        Path("/proc/self/oom_score_adj").write_text("1000")
    if Guard.FILES not in missing:
        paths, size = order["paths"], limits.scratch_bytes
        _attempt(Guard.FILES, missing, enter_private_root, paths, size)
    kernel.gain_no_privileges()
    with suppress(OSError):  # a kernel without keyrings
        kernel.forget_keys()
    _attempt(Guard.SYSTEM_CALLS, missing, forbid_system_calls)
    if not set(missing) <= set(order["allow_missing"]):
        return {"missing": missing}

    started = time.monotonic()
    trouble, tell = os.pipe()
    child = os.fork()
    if child == 0:
        caller.detach()
        _keep_open([*fds, tell])
        try:
            os.chdir(order["folder"] if Guard.FILES in missing else SCRATCH)
            _become_nobody(limits, missing, change_ids=order["change_ids"])
        except BaseException:
            os.write(tell, traceback.format_exc().encode())
            os._exit(1)
        os.close(tell)
        sys.path = [path for path in sys.path if path != order["library"]]
        _ROLES[order["role"]](order["job"], fds)
        sys.exit(0)
    for fd in (*fds, tell):
        os.close(fd)
    with os.fdopen(trouble) as told:
        why = told.read()
    if why:
        raise RuntimeError(f"the code was not run, for it could not be confined:\n{why}")
    stopped = _wait(child, caller, limits.wall_s)
    with suppress(ProcessLookupError):  # without a pid namespace, some of its children may be left
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "missing": missing,
        "returncode": os.waitstatus_to_exitcode(status),
        "stopped": stopped,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "seconds": time.monotonic() - started,
    }


def _wait(child: int, caller: socket.socket, wall_s: float) -> str | None:
    """Wait for the child; kill it when time is up ("wall") or the caller has ended ("caller")."""
    ended = os.pidfd_open(child)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(caller, select.POLLIN)
    ready = [descriptor for descriptor, _ in poll.poll(wall_s * 1000)]
    if ended in ready:
        return None
    os.kill(child, signal.SIGKILL)
    return "caller" if ready else "wall"


def _keep_open(descriptors: Sequence[int]) -> None:
    """Close every descriptor but the standard ones and these."""
    first = 3
    for descriptor in sorted(descriptors):
        os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def _become_nobody(limits: Limits, missing: Mapping[str, str], *, change_ids: bool) -> None:
    os.setsid()
    # The process above this one runs under the same id, and is counted, where ids are not changed.
    impose(limits, others=0 if change_ids else 1)
    if change_ids:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except PermissionError:
            if Guard.USER not in missing:
                raise
    kernel.drop_capabilities()
    kernel.allow_no_debugger()
    kernel.die_with_parent()
    if Guard.SYSTEM_CALLS not in missing:
        forbid_to_outlive()
