"""Set up this process as a client of the stack, and run parts of the demo as child processes.

The output of a child process is shown on the screen. Its memory is free when it ends.
"""

import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from queue import Empty, SimpleQueue

from demo.screen import DemoError, Screen
from infra.stack.settings import StackSettings, without_services

__all__ = ["Module", "become_client_of", "run_module"]

_POLL_S = 0.5


def become_client_of(stack: StackSettings) -> None:
    """Set the environment so that this process uses only the stack's servers, and logs little."""
    own = without_services(os.environ)
    os.environ.clear()
    os.environ.update(own, **stack.client_environment)
    os.environ.update(
        TRANS_PEFT_STATE=str(stack.state / "demo"),  # separate from the worker's cache
        MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false",
        # A server that stopped ends the demo in seconds; MLflow's default retries for minutes.
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="3",
        MLFLOW_LOGGING_LEVEL="WARNING",
        MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true",
        PREFECT_LOGGING_LEVEL="WARNING",
        TQDM_DISABLE="1",
        TOKENIZERS_PARALLELISM="false",
    )


def run_module(arguments: Sequence[str], screen: Screen) -> None:
    """Run `python -m ...` and show its output line by line. DemoError if it fails."""
    with Module(arguments) as module:
        module.finish(screen)


class Module:
    """Runs `python -m ...` in the background. It is terminated at the end of the `with` block."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._name = f"python -m {arguments[0]}"
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        environment = {
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin are slow on a busy machine
            **os.environ,
            "TQDM_DISABLE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> "Module":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def finish(self, screen: Screen) -> None:
        """Show the output so far, then each line until the program ends. DemoError if it fails."""
        last: deque[str] = deque(maxlen=15)
        started = time.monotonic()
        while (line := self._next()) is not None:
            if line:
                last.append(line)
                screen.line(line)
            screen.heartbeat(f"{self._name}: {time.monotonic() - started:.0f} s")
        if code := self._process.wait():
            raise DemoError(f"{self._name} ended with exit code {code}", found="\n".join(last))

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                self._lines.put(line.rstrip())
        self._lines.put(None)

    def _next(self) -> str | None:
        try:
            return self._lines.get(timeout=_POLL_S)
        except Empty:
            return ""
