"""The fork server's side of a sandbox: sets up the guards, starts the job, and ends it.

`trans_peft.sandbox.forkserver` starts an interpreter with an empty environment, which runs `main`
and forks one supervisor process for each sandbox. The supervisor leaves the caller's namespaces,
reports which of them it could not leave, waits for the caller's request, and forks the child that
runs the job. The child becomes the user nobody. It is process 1 of its pid namespace, so that the
kernel kills everything that it started, daemons included, when it ends. The supervisor stays
outside that namespace, where the child cannot reach it. It kills the child at the wall limit, and
when its caller ends, because the kernel then closes their socket.
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

from trans_peft.sandbox import candidate, checker, kernel, script
from trans_peft.sandbox.guards import Guard
from trans_peft.sandbox.limits import SandboxLimits, set_limits
from trans_peft.sandbox.root import SCRATCH, enter_private_root
from trans_peft.sandbox.system_calls import forbid_pdeathsig_changes, forbid_system_calls

__all__ = ["NOBODY", "main"]

NOBODY = 65534
_MAX_FDS = 8

_NAMESPACES = {
    Guard.USER: kernel.CLONE_NEWUSER,  # first: it gives the right to create the others
    Guard.FILES: kernel.CLONE_NEWNS,
    Guard.PROCESSES: kernel.CLONE_NEWPID,
    Guard.NETWORK: kernel.CLONE_NEWNET,
    Guard.IPC: kernel.CLONE_NEWIPC,
}
_ROLES = {"script": script.run, "candidate": candidate.serve, "checker": checker.run_tests}


def main(control_fd: int) -> None:
    """Fork a supervisor for each message with descriptors until the control socket closes.

    The first descriptor of a message is the socket to the caller, the others are the job's.
    """
    control = socket.socket(fileno=control_fd)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no process waits for the supervisors
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1, _MAX_FDS)
        if not data:
            return
        if os.fork() == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            _supervise(socket.socket(fileno=fds[0]), fds[1:])
            os._exit(0)
        for fd in fds:
            os.close(fd)


def _supervise(caller: socket.socket, fds: list[int]) -> None:
    """Run one sandbox. Each message to and from the caller is a JSON object on one line."""
    stream, own_pid = caller.makefile("rwb"), os.getpid()

    def report(message: Mapping[str, Any]) -> None:
        stream.write(json.dumps(message).encode() + b"\n")
        stream.flush()

    try:
        missing: dict[str, str] = {}
        for guard, flag in _NAMESPACES.items():
            _attempt(guard, missing, kernel.unshare, flag)
        report({"missing": missing, "pid": own_pid})
        request = stream.readline()
        if request:  # without one, the caller does not accept the missing guards
            report(_run_job(json.loads(request), caller, fds))
    except Exception:
        if os.getpid() != own_pid:  # the exception is the child's, and its stderr gets the text
            raise
        report({"error": traceback.format_exc()})


def _attempt(
    guard: Guard, missing: dict[str, str], step: Callable[..., None], *arguments: object
) -> None:
    try:
        step(*arguments)
    except OSError as error:
        missing[guard.value] = error.strerror or str(error)


def _run_job(
    request: Mapping[str, Any], caller: socket.socket, fds: list[int]
) -> Mapping[str, Any]:
    """Set up the remaining guards, run the job in a child, and return how the child ended."""
    limits = SandboxLimits(**request["limits"])
    missing: dict[str, str] = request["missing"]
    with suppress(OSError):  # if memory runs out, the kernel kills this process before the caller
        Path("/proc/self/oom_score_adj").write_text("1000")
    if Guard.FILES not in missing:
        paths, size = request["paths"], limits.scratch_bytes
        _attempt(Guard.FILES, missing, enter_private_root, paths, size)
    kernel.set_no_new_privileges()
    with suppress(OSError):  # a kernel without keyrings
        kernel.leave_session_keyring()
    _attempt(Guard.SYSTEM_CALLS, missing, forbid_system_calls)
    if not set(missing) <= set(request["allow_missing"]):
        return {"missing": missing}

    started = time.monotonic()
    error_fd, child_error_fd = os.pipe()
    child = os.fork()
    if child == 0:
        caller.detach()
        _close_all_but([*fds, child_error_fd])
        try:
            os.chdir(request["working_folder"] if Guard.FILES in missing else SCRATCH)
            _drop_privileges(limits, missing, change_ids=request["change_ids"])
        except BaseException:
            os.write(child_error_fd, traceback.format_exc().encode())
            os._exit(1)
        os.close(child_error_fd)
        sys.path = [path for path in sys.path if path != request["library"]]
        _ROLES[request["role"]](request["job"], fds)
        sys.exit(0)
    for fd in (*fds, child_error_fd):
        os.close(fd)
    with os.fdopen(error_fd) as stream:
        setup_error = stream.read()
    if setup_error:
        raise RuntimeError(f"the child could not be confined, no program was run:\n{setup_error}")
    stopped_by = _wait(child, caller, limits.wall_s)
    with suppress(ProcessLookupError):  # without a pid namespace, children of it may be left
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "missing": missing,
        "returncode": os.waitstatus_to_exitcode(status),
        "stopped_by": stopped_by,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "wall_s": time.monotonic() - started,
    }


def _wait(child: int, caller: socket.socket, wall_s: float) -> str | None:
    """Wait for the child. Kill it at the wall limit ("wall") or if the caller ends ("caller")."""
    child_fd = os.pidfd_open(child)
    poll = select.poll()
    poll.register(child_fd, select.POLLIN)
    poll.register(caller, select.POLLIN)
    ready = [descriptor for descriptor, _ in poll.poll(wall_s * 1000)]
    if child_fd in ready:
        return None
    os.kill(child, signal.SIGKILL)
    return "caller" if ready else "wall"


def _close_all_but(descriptors: Sequence[int]) -> None:
    """Close every descriptor except the standard ones and these."""
    first = 3
    for descriptor in sorted(descriptors):
        os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def _drop_privileges(
    limits: SandboxLimits, missing: Mapping[str, str], *, change_ids: bool
) -> None:
    """Set the limits, become the user nobody, and give up all capabilities."""
    os.setsid()
    # Without a change of ids, the kernel counts the supervisor too, which has the same id.
    set_limits(limits, other_processes=0 if change_ids else 1)
    if change_ids:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except PermissionError:
            if Guard.USER not in missing:
                raise
    kernel.drop_capabilities()
    kernel.forbid_tracing()
    kernel.set_parent_death_signal()
    if Guard.SYSTEM_CALLS not in missing:
        forbid_pdeathsig_changes()
