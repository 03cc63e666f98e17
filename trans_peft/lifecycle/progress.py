"""What an evaluation says while it runs."""

import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["EvaluationProgress", "ProgressCallback", "progress_reporter"]


@dataclass(frozen=True)
class EvaluationProgress:
    """How far one adapter (or the bare base) is with one suite on one base.

    `eta_s` is how long the rest takes if its items take as long as those before: rather too much,
    since the longest come first and a sequential test may stop before the last.
    """

    adapter: str
    suite: str
    base: str
    done: int
    total: int
    eta_s: float

    @property
    def what(self) -> str:
        """Who answers what, the same from the first item to the last."""
        return f"{self.adapter}: {self.suite} on {self.base}"

    def __str__(self) -> str:
        rest = f", {self.eta_s:.0f} s left" if self.done < self.total else ""
        return f"{self.what}: {self.done} of {self.total} items{rest}"


ProgressCallback = Callable[[EvaluationProgress], None]
"""Called each time that a batch is answered."""


def progress_reporter(
    on_progress: ProgressCallback | None,
    adapter: str,
    suite: str,
    base: str,
    *,
    before: int = 0,
    total: int | None = None,
) -> Callable[[int, int], None]:
    """Return what to call with items done and items in all; it knows the time since now.

    `before` items were answered earlier, and there are `total` then; None: as many as it is told.
    """
    started = time.monotonic()

    def report(done: int, of: int) -> None:
        if on_progress is None:
            return
        whole, done = (of if total is None else total), before + done
        eta_s = (time.monotonic() - started) / (done - before) * (whole - done)
        on_progress(EvaluationProgress(adapter, suite, base, done, whole, eta_s))

    return report
