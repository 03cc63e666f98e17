"""Ports and processes of this machine.

A process belongs to the stack if it inherited an environment variable, the mark, from the process
manager. Flow runs have it too, although a Prefect worker starts them in their own sessions, outside
of its process group. The mark remains valid after the manager was killed or the state folder was
deleted.
"""

import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from infra.stack.settings import HOST

__all__ = ["MARK", "PROGRAM_MARK", "end", "free_ports", "marked", "owner", "port_is_free"]

MARK = "TRANS_PEFT_STARTED_BY"
PROGRAM_MARK = "TRANS_PEFT_PROGRAM"


def port_is_free(port: int) -> bool:
    """Whether a server can listen on this port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free_ports(count: int) -> list[int]:
    """Return this many different ports on which no process listens now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((HOST, 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def owner(port: int) -> str:
    """Return a description of the process that listens on this port, as far as it is visible."""
    try:
        found = (c for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port)
        pid = next((c.pid for c in found if c.status == psutil.CONN_LISTEN and c.pid), None)
        if pid is None:
            return "a process of another user"
        return f"process {pid}: {' '.join(psutil.Process(pid).cmdline())[:120]}"
    except psutil.Error:
        return "a process that this user cannot inspect"


def marked(state: Path, program: str | None = None) -> list[psutil.Process]:
    """Return the running processes with the mark of this state folder (of one program, or all)."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except (psutil.Error, OSError):  # ended meanwhile, or belongs to another user
            continue
        is_marked = process.pid != os.getpid() and environment.get(MARK) == str(state)
        if is_marked and program in (None, environment.get(PROGRAM_MARK)):
            found.append(process)
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


def end(processes: Iterable[psutil.Process], grace_s: float) -> None:
    """Terminate the processes, and kill those that still run after the grace period."""
    processes = list(processes)
    for process in processes:
        _signal(process, kill=False)
    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        _signal(process, kill=True)
    psutil.wait_procs(alive, timeout=5)


def _signal(process: psutil.Process, *, kill: bool) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill() if kill else process.terminate()
