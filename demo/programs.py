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

__all__ = ["become_client_of", "run_module"]

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
    environment = {
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin are many times slower on a busy machine
        **os.environ,
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    lines: SimpleQueue[str | None] = SimpleQueue()
    last: deque[str] = deque(maxlen=15)
    with subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line.rstrip())
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        started = time.monotonic()
        try:
            while (line := _next(lines)) is not None:
                if line:
                    last.append(line)
                    screen.line(line)
                screen.heartbeat(f"python -m {arguments[0]}: {time.monotonic() - started:.0f} s")
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise DemoError(
            f"python -m {arguments[0]} ended with exit code {process.returncode}",
            found="\n".join(last),
        )


def _next(lines: "SimpleQueue[str | None]") -> str | None:
    try:
        return lines.get(timeout=_POLL_S)
    except Empty:
        return ""
