"""Output of the demo: sections, and lines with the elapsed time at least every few seconds."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

from trans_peft.errors import TransPeftError

__all__ = ["DemoError", "Screen", "servers_gone"]

_SILENCE_S = 5.5  # the stack and the flows print a line every five seconds


class DemoError(TransPeftError, RuntimeError):
    """A step of the demo failed."""


def servers_gone(found: object) -> DemoError:
    """Return the error for a server of the stack that stopped while the demo ran."""
    return DemoError(
        "a server of the stack fails or does not respond any more",
        expected="the servers that the demo started: MLflow, Prefect and S3",
        found=found,
        do="`make status` shows the servers; `make demo` starts them and resumes",
    )


class Screen:
    """Prints lines with the minutes and seconds since the start of the demo."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._started = time.monotonic()
        self._last_line = self._started

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start of the demo."""
        return time.monotonic() - self._started

    def section(self, title: str, description: str) -> None:
        """Print the heading of a step."""
        self.console.print(f"\n[bold cyan]{escape(title)}[/]  [dim]{escape(description)}[/]")
        self._last_line = time.monotonic()

    def line(self, text: str, style: str = "") -> None:
        """Print one line."""
        minutes, seconds = divmod(int(self.elapsed_s), 60)
        content = f"[{style}]{escape(text)}[/]" if style else escape(text)
        self.console.print(f"[dim]{minutes:3d}:{seconds:02d}[/]  {content}", soft_wrap=True)
        self._last_line = time.monotonic()

    def success(self, text: str) -> None:
        """Print the result of a step."""
        self.line(f"✓ {text}", "green")

    def heartbeat(self, text: str) -> None:
        """Print the line if none was printed for some seconds."""
        if time.monotonic() - self._last_line > _SILENCE_S:
            self.line(text, "dim")

    def progress_reporter(
        self, what: str, unit: str, per: float = 1.0
    ) -> Callable[[int, int], None]:
        """Return a callback (done, total) that prints progress every few seconds."""

        def show(done: int, total: int) -> None:
            self.heartbeat(f"{what}: {done / per:,.0f} of {total / per:,.0f} {unit}")

        return show
