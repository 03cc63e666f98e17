"""Up, down, status: the life of the stack, told in lines with their elapsed time."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from infra.stack.health import healthy, make_buckets
from infra.stack.machine import end, marked, owner, port_is_free
from infra.stack.programs import PROGRAMS, left_behind
from infra.stack.settings import BUCKETS, StackSettings, without_services
from infra.stack.supervisor import Supervisor
from trans_peft.domain.conventions import WORK_POOL
from trans_peft.errors import TransPeftError

__all__ = ["Say", "StackError", "down", "status", "up"]

Say = Callable[[str], None]
_PATIENCE_S = 300.0
_SILENCE_S = 5.0
_CODE = Path(__file__).resolve().parents[2]


class StackError(TransPeftError, RuntimeError):
    """A stack that cannot start, or a program of it that died."""


def up(settings: StackSettings, say: Say) -> None:
    """Start what does not run yet and return when everything is healthy and deployed.

    StackError at once if a port is taken or a program dies, with the last lines of its log; what
    was started for nothing is stopped again.
    """
    settings.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    settings.logs.mkdir(exist_ok=True)
    with _alone(settings):
        _Stack(settings, say).up()


def down(settings: StackSettings, say: Say) -> None:
    """Stop what `up` started, and nothing else. Nothing to stop is fine."""
    with _alone(settings):
        _Stack(settings, say).down()


def status(settings: StackSettings, say: Say) -> bool:
    """Say how each program does; whether all are healthy."""
    programs = Supervisor(settings).programs()
    all_well = bool(programs)
    for name in PROGRAMS:
        program = programs.get(name)
        running = program is not None and program.state == "RUNNING"
        well = running and healthy(name, settings)
        all_well = all_well and well
        word = program.state.lower() if program and not running else "not running"
        word = "ok" if well else "not healthy" if running else word
        since = f"pid {program.pid}, up {program.since_s} s" if program and program.pid else ""
        say(f"{name:8} {word:12} {settings.urls.get(name, WORK_POOL):24} {since}")
    return all_well


class _Stack:
    """One `up` or one `down` at work."""

    def __init__(self, settings: StackSettings, say: Say) -> None:
        self._settings = settings
        self._supervisor = Supervisor(settings)
        self._tell = say
        self._started = time.monotonic()
        self._pids: dict[str, int] = {}

    def up(self) -> None:
        fresh = not self._supervisor.is_running()
        if fresh:
            self._sweep()
            self._check_ports()
            self._start_manager()
        else:
            self._check_same()
        try:
            self._start_programs()
        except BaseException:
            if fresh:
                self.down()
            raise
        for name, url in self._settings.urls.items():
            self._tell(f"{name:8} {url}")
        self._tell("Prefect's page asks for a password: make login, or python -m infra.stack login")

    def down(self) -> None:
        running = [name for name, program in self._supervisor.programs().items() if program.pid]
        for name in reversed(running):
            self._supervisor.stop_program(name)
            spoken = time.monotonic()
            while self._supervisor.pid(name):
                if time.monotonic() - spoken > _SILENCE_S:
                    spoken = time.monotonic()
                    self._say(name, "is ending")
                time.sleep(0.1)
            self._say(name, "stopped")
        self._supervisor.shut_down()
        self._sweep()
        for path in left_behind(self._settings):
            path.unlink(missing_ok=True)
        self._say("stack", "down")

    def _start_manager(self) -> None:
        _ = self._settings.secrets  # made by one, before several programs ask for them
        self._choices_file.write_text(self._choices)
        try:
            self._supervisor.start()
        except subprocess.CalledProcessError as failed:
            raise StackError(f"The process manager did not start: {failed.stderr}") from failed

    def _start_programs(self) -> None:
        settings = self._settings
        for name in ("s3", "mlflow", "prefect"):
            self._start(name)
        self._wait("s3", "prefect")  # MLflow takes longest, and nothing before the end needs it
        make_buckets(settings)
        self._say("s3", f"buckets {', '.join(BUCKETS)}")
        environment = {
            **without_services(os.environ),
            **settings.client_environment,
            "GPU_SLOTS": str(settings.gpu_slots),
            "PYTHONPATH": str(_CODE),
        }
        environment.pop("TRANS_PEFT_CHECKOUT", None)  # the worker's to fill in, not the deployer's
        self._run("register", ["-m", "infra.stack.prefect_objects"], environment)
        self._say("prefect", f"work pool {WORK_POOL}, GPU slots: {settings.gpu_slots}")
        self._start("worker")
        self._run("deploy", ["-m", "prefect", "--no-prompt", "deploy", "--all"], environment)
        self._say("prefect", f"deployed {settings.checkout / 'prefect.yaml'}")
        self._start("bridge")
        self._wait("mlflow", "worker", "bridge")
        webhooks = {**environment, **settings.bridge_environment}
        self._run("webhooks", ["-m", "infra.bridge", "webhooks"], webhooks)
        self._say("bridge", "MLflow and S3 send their hints here")

    def _start(self, name: str) -> None:
        self._supervisor.start_program(name)
        self._pids[name] = self._supervisor.pid(name)

    def _check_alive(self) -> None:
        """StackError if any program that was started has died, or was started again, since."""
        for name, pid in self._pids.items():
            if pid == 0 or self._supervisor.pid(name) != pid:
                raise StackError(f"{name} died while it started.\n{self._last_lines(name)}")

    def _wait(self, *names: str) -> None:
        """Wait until each of the programs is healthy."""
        spoken = time.monotonic()
        waiting = list(names)
        while waiting:
            self._check_alive()
            for name in list(waiting):
                if healthy(name, self._settings):
                    waiting.remove(name)
                    spoken = time.monotonic()
                    self._say(name, "healthy")
            if waiting and self._elapsed_s > _PATIENCE_S:
                words = f"{waiting[0]} is not healthy after {_PATIENCE_S:.0f} s."
                raise StackError(f"{words}\n{self._last_lines(waiting[0])}")
            if waiting and time.monotonic() - spoken > _SILENCE_S:
                spoken = time.monotonic()
                self._say(", ".join(waiting), "starting")
            time.sleep(0.25 if waiting else 0)

    def _run(self, name: str, arguments: list[str], environment: Mapping[str, str]) -> None:
        """Run one program to its end, with its words in a log of its own. StackError."""
        with (self._settings.logs / f"{name}.log").open("w") as log:
            running = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self._settings.checkout,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            spoken = time.monotonic()
            try:
                while running.poll() is None:
                    self._check_alive()
                    if time.monotonic() - spoken > _SILENCE_S:
                        spoken = time.monotonic()
                        self._say("prefect", f"{name} is at work")
                    time.sleep(0.25)
            finally:
                running.kill()
                running.wait()
        if running.returncode:
            words = f"{name} ended with exit code {running.returncode}."
            raise StackError(f"{words}\n{self._last_lines(name)}")

    def _check_ports(self) -> None:
        taken = [
            f"  port {port} is in use by {owner(port)}; choose another: {variable}=..."
            for variable, port in self._settings.ports.items()
            if not port_is_free(port)
        ]
        if taken:
            raise StackError("\n".join(["The stack cannot start.", *taken]))

    def _check_same(self) -> None:
        running = self._choices_file.read_text()
        if running != self._choices:
            raise StackError(
                "The stack of this state folder runs already, with other settings.",
                expected=self._choices,
                found=running,
                do="make down first, or choose another state folder: TRANS_PEFT_STATE=...",
            )

    @property
    def _choices(self) -> str:
        shown = {**self._settings.ports, "TRANS_PEFT_CHECKOUT": self._settings.checkout}
        return " ".join(f"{name}={value}" for name, value in shown.items())

    @property
    def _choices_file(self) -> Path:
        return self._settings.state / "running-with"

    def _sweep(self) -> None:
        """End the flow runs that a stopped worker left, or everything that a killed manager did."""
        left = marked(self._settings.state)
        if left:
            self._say("stack", f"ending processes left: {', '.join(str(p.pid) for p in left)}")
            end(left, grace_s=10)

    def _last_lines(self, name: str, count: int = 20) -> str:
        path = self._settings.logs / f"{name}.log"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join([f"last lines of {path}:", *(f"  {line}" for line in lines[-count:])])

    @property
    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def _say(self, name: str, words: str) -> None:
        self._tell(f"{self._elapsed_s:5.1f} s  {name:8} {words}")


@contextmanager
def _alone(settings: StackSettings) -> Iterator[None]:
    """One `up` or `down` at a time for one state folder."""
    if not settings.state.exists():
        yield
        return
    with (settings.state / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StackError(f"Another up or down is at work on {settings.state}.") from error
        yield
