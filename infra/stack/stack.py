"""Starts and stops the stack and shows its state. Progress lines carry the elapsed time."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from infra.stack.health import create_buckets, is_healthy
from infra.stack.interrupted import INTERRUPTED_S
from infra.stack.kept_parameters import KeptParameters
from infra.stack.machine import end, marked, owner, port_is_free
from infra.stack.programs import PROGRAMS, leftover_sockets
from infra.stack.settings import BUCKETS, StackSettings, without_services
from infra.stack.supervisor import Supervisor
from trans_peft.domain.conventions import WORK_POOL
from trans_peft.errors import TransPeftError

__all__ = ["Report", "StackError", "check_client", "down", "status", "up"]

Report = Callable[[str], None]
_TIMEOUT_S = 300.0
_REPORT_EVERY_S = 5.0
_CODE = Path(__file__).resolve().parents[2]


class StackError(TransPeftError, RuntimeError):
    """The stack cannot start, or one of its programs exited."""


def up(settings: StackSettings, report: Report) -> None:
    """Start the programs that do not run, and return when all are healthy and flows are deployed.

    StackError, with the last lines of the log, as soon as a port is taken or a program exits. What
    was started is then stopped again.
    """
    settings.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    settings.logs.mkdir(exist_ok=True)
    with _locked(settings):
        _Stack(settings, report).up()


def down(settings: StackSettings, report: Report) -> None:
    """Stop what `up` started. Succeeds if nothing runs."""
    with _locked(settings):
        _Stack(settings, report).down()


def check_client(settings: StackSettings) -> None:
    """StackError if the stack of this state folder runs with other ports than these settings."""
    if not settings.has_ports_of_last_up and Supervisor(settings).is_running():
        _refuse_other_settings(
            settings,
            "unset the variables of the ports, or set TRANS_PEFT_STATE to another state folder",
        )


def status(settings: StackSettings, report: Report) -> bool:
    """Report the state of each program, and return whether all are healthy.

    StackError if the stack runs with other ports.
    """
    check_client(settings)
    programs = Supervisor(settings).programs()
    all_healthy = bool(programs)
    for name in PROGRAMS:
        program = programs.get(name)
        running = program is not None and program.state == "RUNNING"
        healthy = running and is_healthy(name, settings)
        all_healthy = all_healthy and healthy
        stopped = program.state.lower() if program else "not running"
        state = "ok" if healthy else "not healthy" if running else stopped
        since = f"pid {program.pid}, up {program.since_s} s" if program and program.pid else ""
        report(f"{name:8} {state:12} {settings.urls.get(name, WORK_POOL):24} {since}")
    return all_healthy


class _Stack:
    """One `up` or `down` in progress."""

    def __init__(self, settings: StackSettings, report: Report) -> None:
        self._settings = settings
        self._supervisor = Supervisor(settings)
        self._report = report
        self._started = time.monotonic()
        self._pids: dict[str, int] = {}

    def up(self) -> None:
        fresh = not self._supervisor.is_running()
        if fresh:
            self._end_leftovers()
            self._check_ports()
            self._start_manager()
        else:
            self._check_settings()
        try:
            self._start_programs()
        except BaseException:
            if fresh:
                self.down()
            raise
        for name, url in self._settings.urls.items():
            self._report(f"{name:8} {url}")
        self._report("Password of Prefect's page: make login, or python -m infra.stack login")

    def down(self) -> None:
        running = [name for name, program in self._supervisor.programs().items() if program.pid]
        for name in reversed(running):
            self._supervisor.stop_program(name)
            reported_at = time.monotonic()
            while self._supervisor.pid(name):
                if time.monotonic() - reported_at > _REPORT_EVERY_S:
                    reported_at = time.monotonic()
                    self._log(name, "is stopping")
                time.sleep(0.1)
            # Flow runs save a checkpoint while the servers of their results still run.
            end(marked(self._settings.state, name), grace_s=INTERRUPTED_S)
            self._log(name, "stopped")
        self._supervisor.shut_down()
        self._end_leftovers()
        for path in leftover_sockets(self._settings):
            path.unlink(missing_ok=True)
        self._log("stack", "down")

    def _start_manager(self) -> None:
        _ = self._settings.secrets  # generated before several programs read them
        self._settings.last_up.write_text(self._settings.chosen_at_up)
        try:
            self._supervisor.start()
        except subprocess.CalledProcessError as failed:
            raise StackError(
                "the process manager did not start",
                found=failed.stderr.strip(),
                do=f"read {self._settings.logs / 'supervisor.log'}",
            ) from failed

    def _start_programs(self) -> None:
        settings = self._settings
        for name in ("s3", "mlflow", "prefect"):
            self._start(name)
        self._wait("s3", "prefect")  # MLflow takes longest, and the next steps do not need it
        create_buckets(settings)
        self._log("s3", f"buckets {', '.join(BUCKETS)}")
        environment = {
            **without_services(os.environ),
            **settings.client_environment,
            "GPU_SLOTS": str(settings.gpu_slots),
            "PYTHONPATH": str(_CODE),
        }
        environment.pop(
            "TRANS_PEFT_CHECKOUT", None
        )  # the worker inserts its own, not the deployer's
        self._run("register", ["-m", "infra.stack.prefect_objects"], environment)
        self._log("prefect", f"work pool {WORK_POOL}, GPU slots: {settings.gpu_slots}")
        self._start("worker")
        kept = KeptParameters.read(settings)
        self._run("deploy", ["-m", "prefect", "--no-prompt", "deploy", "--all"], environment)
        self._log("prefect", f"deployed {settings.checkout / 'prefect.yaml'}")
        if line := kept.restore():
            self._log("prefect", line)
        self._start("bridge")
        self._start("ui")
        self._start("exporter")
        self._wait("mlflow", "worker", "bridge", "ui", "exporter")
        webhooks = {**environment, **settings.bridge_environment}
        self._run("webhooks", ["-m", "infra.bridge", "webhooks"], webhooks)
        self._log("bridge", "receives the notifications of MLflow and S3")

    def _start(self, name: str) -> None:
        self._supervisor.start_program(name)
        self._pids[name] = self._supervisor.pid(name)

    def _check_alive(self) -> None:
        """StackError if any started program has exited, or was restarted, since then."""
        for name, pid in self._pids.items():
            if pid == 0 or self._supervisor.pid(name) != pid:
                raise StackError(f"{name} exited during its start.\n{self._last_lines(name)}")

    def _wait(self, *names: str) -> None:
        """Wait until each of the programs is healthy."""
        reported_at = time.monotonic()
        waiting = list(names)
        while waiting:
            self._check_alive()
            for name in list(waiting):
                if is_healthy(name, self._settings):
                    waiting.remove(name)
                    reported_at = time.monotonic()
                    self._log(name, "healthy")
            if waiting and self._elapsed_s > _TIMEOUT_S:
                problem = f"{waiting[0]} is not healthy after {_TIMEOUT_S:.0f} s."
                raise StackError(f"{problem}\n{self._last_lines(waiting[0])}")
            if waiting and time.monotonic() - reported_at > _REPORT_EVERY_S:
                reported_at = time.monotonic()
                self._log(", ".join(waiting), "starting")
            time.sleep(0.25 if waiting else 0)

    def _run(self, name: str, arguments: list[str], environment: Mapping[str, str]) -> None:
        """Run one program until it exits, with its output in its own log. StackError."""
        with (self._settings.logs / f"{name}.log").open("w") as log:
            running = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self._settings.checkout,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            reported_at = time.monotonic()
            try:
                while running.poll() is None:
                    self._check_alive()
                    if time.monotonic() - reported_at > _REPORT_EVERY_S:
                        reported_at = time.monotonic()
                        self._log("prefect", f"{name} is running")
                    time.sleep(0.25)
            finally:
                running.kill()
                running.wait()
        if running.returncode:
            problem = f"{name} exited with code {running.returncode}."
            raise StackError(f"{problem}\n{self._last_lines(name)}")

    def _check_ports(self) -> None:
        taken = [
            f"  port {port} is in use by {owner(port)}; choose another: {variable}=..."
            for variable, port in self._settings.ports.items()
            if not port_is_free(port)
        ]
        if taken:
            raise StackError("\n".join(["the stack cannot start:", *taken]))

    def _check_settings(self) -> None:
        if self._settings.last_up.read_text() != self._settings.chosen_at_up:
            do = "run make down first, or choose another state folder: TRANS_PEFT_STATE=..."
            _refuse_other_settings(self._settings, do)

    def _end_leftovers(self) -> None:
        """End the flow runs of a stopped worker, or all programs of a killed manager."""
        left = marked(self._settings.state)
        if left:
            self._log("stack", f"ending leftover processes: {', '.join(str(p.pid) for p in left)}")
            end(left, grace_s=INTERRUPTED_S)

    def _last_lines(self, name: str, count: int = 20) -> str:
        path = self._settings.logs / f"{name}.log"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join([f"last lines of {path}:", *(f"  {line}" for line in lines[-count:])])

    @property
    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def _log(self, name: str, message: str) -> None:
        self._report(f"{self._elapsed_s:5.1f} s  {name:8} {message}")


def _refuse_other_settings(settings: StackSettings, do: str) -> NoReturn:
    raise StackError(
        f"the stack of {settings.state} already runs with other settings",
        expected=settings.chosen_at_up,
        found=settings.last_up.read_text(),
        do=do,
    )


@contextmanager
def _locked(settings: StackSettings) -> Iterator[None]:
    """Allow one `up` or `down` at a time for one state folder."""
    if not settings.state.exists():
        yield
        return
    with (settings.state / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StackError(
                f"another up or down is running for {settings.state}",
                do="wait until it has ended, then try again",
            ) from error
        yield
