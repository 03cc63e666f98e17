"""The process manager: supervisor (supervisord.org), with its configuration below the state folder.

It starts each program again when it dies, bounds the logs, and stops whole process groups. It is
asked through its unix socket (XML-RPC), which only this user may open. It reads what the programs
write, so where it is killed itself, they die one after another as they write (weed of SIGPIPE, the
worker as rich ends it): `up` ends what is left and starts all of it again.
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

_NOTHING_TO_DO = (Faults.SHUTDOWN_STATE, Faults.ALREADY_STARTED, Faults.NOT_RUNNING)
_CODE = str(Path(__file__).resolve().parents[2])


@dataclass(frozen=True)
class ProgramState:
    """What the process manager knows of one program: RUNNING, BACKOFF ...; pid 0: not running."""

    name: str
    state: str
    pid: int
    since_s: int


def configuration(settings: StackSettings) -> RawConfigParser:
    """Return supervisor's configuration: one program a section, in the order of starting."""
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
            # The worker starts once its pool is there, the bridge once the deployment is.
            "autostart": str(program.name not in ("worker", "bridge")).lower(),
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
    """The process manager of one state folder, running or not."""

    def __init__(self, settings: StackSettings) -> None:
        self._settings = settings

    def start(self) -> None:
        """Start the manager, which starts the servers. CalledProcessError with its words."""
        path = self._settings.state / "supervisor.conf"
        with path.open("w") as file:
            configuration(self._settings).write(file)
        environment = {
            **os.environ,
            **self._settings.to_environment(),
            "PYTHONUNBUFFERED": "1",
            # The code of the stack is this file's, whatever checkout is deployed.
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
        return bool(self._ask("getState"))

    def programs(self) -> dict[str, ProgramState]:
        """Return the state of every program, in the order of starting; empty without a manager."""
        known = {p["name"]: p for p in self._ask("getAllProcessInfo") or []}
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
        """Return the process of this program; 0 if it does not run."""
        program = self.programs().get(name)
        return program.pid if program else 0

    def start_program(self, name: str) -> None:
        """Start one program, if it does not run."""
        self._ask("startProcess", name, False)

    def stop_program(self, name: str) -> None:
        """Ask one program to stop. Returns at once."""
        self._ask("stopProcess", name, False)

    def shut_down(self) -> None:
        """Ask the manager to end, and wait until it has."""
        pid = self._ask("getPID")
        self._ask("shutdown")
        if pid and psutil.pid_exists(pid):
            psutil.wait_procs([psutil.Process(pid)], timeout=60)

    def _ask(self, method: str, *arguments: object) -> Any:
        """Call the manager; None where there is none, or nothing to do."""
        transport = SupervisorTransport(None, None, f"unix://{self._settings.socket}")
        with ServerProxy("http://127.0.0.1", transport=transport) as manager:
            try:
                return getattr(manager.supervisor, method)(*arguments)
            except (OSError, HTTPException):
                return None
            except Fault as fault:
                if fault.faultCode in _NOTHING_TO_DO:
                    return None
                raise
