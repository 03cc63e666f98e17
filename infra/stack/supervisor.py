"""The process manager: supervisor (supervisord.org), with its configuration in the state folder.

It restarts programs that exit, limits the size of logs, and stops whole process groups. It accepts
XML-RPC requests on a unix socket that only this user can open.

Supervisor reads the output of the programs. If it is killed, they exit one after another when they
write (weed because of SIGPIPE, the worker because of an error in rich). `up` then ends the
remaining processes and starts all programs again.
"""

import os
import subprocess
import sys
import time
from configparser import RawConfigParser
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault, ServerProxy

import psutil
from supervisor.xmlrpc import Faults, SupervisorTransport

from infra.stack.machine import MARK
from infra.stack.programs import PROGRAMS
from infra.stack.settings import StackSettings

__all__ = ["ProgramState", "Supervisor", "configuration"]

_NO_CHANGE = (Faults.SHUTDOWN_STATE, Faults.ALREADY_STARTED, Faults.NOT_RUNNING)
_CODE = str(Path(__file__).resolve().parents[2])


@dataclass(frozen=True)
class ProgramState:
    """State of one program as supervisor reports it: RUNNING, BACKOFF, ...; pid 0: not running."""

    name: str
    state: str
    pid: int
    since_s: int


def configuration(settings: StackSettings) -> RawConfigParser:
    """Return supervisor's configuration: one section per program, in start order."""
    config = RawConfigParser()
    here = settings.state
    config["unix_http_server"] = {"file": f"{here}/supervisor.sock", "chmod": "0700"}
    config["rpcinterface:supervisor"] = {
        "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
    }
    config["supervisord"] = {
        "logfile": f"{here}/logs/supervisor.log",
        "logfile_maxbytes": "1MB",
        "pidfile": f"{here}/supervisor.pid",
        "childlogdir": f"{here}/logs",
        "umask": "077",
    }
    for priority, program in enumerate(PROGRAMS.values()):
        config[f"program:{program.name}"] = {
            "command": f'"{sys.executable}" -m infra.stack run {program.name}',
            "priority": str(priority),
            # `up` starts the worker when its pool exists, the bridge when the deployment exists.
            # The others start last, so that they do not slow the start of the servers.
            "autostart": str(program.name in ("s3", "mlflow", "prefect")).lower(),
            "autorestart": "true",
            "startsecs": "2",
            "startretries": "10",
            "stopwaitsecs": str(program.stop_s),
            "stopasgroup": "true",
            "killasgroup": "true",
            "redirect_stderr": "true",
            "stdout_logfile": f"{here}/logs/{program.name}.log",
            "stdout_logfile_maxbytes": "10MB",
            "stdout_logfile_backups": "1",
        }
    return config


class Supervisor:
    """Client of the process manager of one state folder."""

    def __init__(self, settings: StackSettings) -> None:
        self._settings = settings

    def start(self) -> None:
        """Start the manager, which starts the servers. CalledProcessError if it fails."""
        path = self._settings.state / "supervisor.conf"
        with path.open("w") as file:
            configuration(self._settings).write(file)
        environment = {
            **os.environ,
            **self._settings.to_environment(),
            "PYTHONUNBUFFERED": "1",
            # The stack runs the code of this file, even if another checkout is deployed.
            "PYTHONPATH": os.pathsep.join(filter(None, [_CODE, os.environ.get("PYTHONPATH")])),
            MARK: str(self._settings.state),
        }
        subprocess.run(
            [sys.executable, "-m", "supervisor.supervisord", "-c", str(path)],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
        deadline = time.monotonic() + 10
        while not self.is_running() and time.monotonic() < deadline:
            time.sleep(0.1)

    def is_running(self) -> bool:
        """Whether the manager answers."""
        return bool(self._call("getState"))

    def programs(self) -> dict[str, ProgramState]:
        """Return the state of each program in start order; empty if the manager does not run."""
        known = {p["name"]: p for p in self._call("getAllProcessInfo") or []}
        return {
            name: ProgramState(
                name,
                known[name]["statename"],
                known[name]["pid"],
                known[name]["now"] - known[name]["start"] if known[name]["pid"] else 0,
            )
            for name in PROGRAMS
            if name in known
        }

    def pid(self, name: str) -> int:
        """Return the process id of this program; 0 if it does not run."""
        program = self.programs().get(name)
        return program.pid if program else 0

    def start_program(self, name: str) -> None:
        """Start one program, if it does not run."""
        self._call("startProcess", name, False)

    def stop_program(self, name: str) -> None:
        """Begin to stop one program, and return immediately."""
        self._call("stopProcess", name, False)

    def shut_down(self) -> None:
        """Stop the manager and wait until it has ended."""
        pid = self._call("getPID")
        self._call("shutdown")
        if pid and psutil.pid_exists(pid):
            psutil.wait_procs([psutil.Process(pid)], timeout=60)

    def _call(self, method: str, *arguments: object) -> Any:
        """Call a method of the manager; None if it does not run or the call changes nothing."""
        transport = SupervisorTransport(None, None, f"unix://{self._settings.socket}")
        with ServerProxy("http://127.0.0.1", transport=transport) as manager:
            try:
                return getattr(manager.supervisor, method)(*arguments)
            except (OSError, HTTPException):
                return None
            except Fault as fault:
                if fault.faultCode in _NO_CHANGE:
                    return None
                raise
