"""What a person reads while the demo runs: chapters, lines with the time, never silence."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

from trans_peft.errors import TransPeftError

__all__ = ["DemoError", "Screen"]

_SILENCE_S = 5.5  # the stack and the flows say something every five seconds


class DemoError(TransPeftError, RuntimeError):
    """A part of the story that did not end as it must."""


class Screen:
    """Prints lines with the minutes and seconds since the demo began."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._started = time.monotonic()
        self._spoken = self._started

    @property
    def elapsed_s(self) -> float:
        """Seconds since the demo began."""
        return time.monotonic() - self._started

    def chapter(self, title: str, why: str) -> None:
        """Begin a new part of the story."""
        self.console.print(f"\n[bold cyan]{escape(title)}[/]  [dim]{escape(why)}[/]")
        self._spoken = time.monotonic()

    def say(self, words: str, style: str = "") -> None:
        """Print one line."""
        minutes, seconds = divmod(int(self.elapsed_s), 60)
        text = f"[{style}]{escape(words)}[/]" if style else escape(words)
        self.console.print(f"[dim]{minutes:3d}:{seconds:02d}[/]  {text}", soft_wrap=True)
        self._spoken = time.monotonic()

    def done(self, words: str) -> None:
        """Print what was reached."""
        self.say(f"✓ {words}", "green")

    def alive(self, words: str) -> None:
        """Print the line if there was none for some seconds."""
        if time.monotonic() - self._spoken > _SILENCE_S:
            self.say(words, "dim")

    def progress_reporter(
        self, what: str, unit: str, per: float = 1.0
    ) -> Callable[[int, int], None]:
        """Return a callback (done, total) that tells how far something is, every few seconds."""

        def show(done: int, total: int) -> None:
            self.alive(f"{what}: {done / per:,.0f} of {total / per:,.0f} {unit}")

        return show
