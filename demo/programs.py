"""Run our own programs as child processes: their lines on the screen, their memory given back."""

import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from queue import Empty, SimpleQueue

from demo.screen import DemoError, Screen

__all__ = ["run_module"]

_POLL_S = 0.5


def run_module(arguments: Sequence[str], screen: Screen) -> None:
    """Run `python -m ...` and show its lines as they come. DemoError where it fails."""
    environment = {**os.environ, "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
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
                    screen.say(line)
                screen.alive(f"python -m {arguments[0]}: {time.monotonic() - started:.0f} s")
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
