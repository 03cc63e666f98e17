"""The progress of work that takes minutes: evaluations, a teacher's answers, recovery trainings."""

import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["ProgressCallback", "WorkProgress", "progress_reporter"]


@dataclass(frozen=True)
class WorkProgress:
    """How much of one piece of work is done.

    Attributes:
        description: What is done, the same from the first to the last report.
        done: Number of units that are done.
        total: Number of all units.
        unit: Name of a unit, in the plural.
        eta_s: Remaining time in seconds at the average speed since the first report; None until a
            tenth of the rest is done. It is an upper estimate for evaluations: the longest items
            come first, and a sequential test may stop early.
    """

    description: str
    done: int
    total: int
    unit: str
    eta_s: float | None

    def __str__(self) -> str:
        return f"{self.description}: {self.done} of {self.total} {self.summary}"

    @property
    def summary(self) -> str:
        """The unit, and the remaining time if it is known."""
        if self.eta_s is None or self.done == self.total:
            return self.unit
        return f"{self.unit}, {self.eta_s:.0f} s left"


ProgressCallback = Callable[[WorkProgress], None]
"""Called after each batch of units."""


def progress_reporter(
    on_progress: ProgressCallback | None,
    description: str,
    unit: str = "items",
    *,
    before: int = 0,
    total: int | None = None,
) -> Callable[[int, int], None]:
    """Return a function that takes (units done, units in total) and calls `on_progress`.

    `before` units were done earlier; `total` replaces the total of the call, for work that runs in
    parts.
    """
    first: tuple[float, int] | None = None

    def report(done: int, of: int) -> None:
        nonlocal first
        if on_progress is None:
            return
        whole, done = (of if total is None else total), before + done
        if done == whole:
            eta_s: float | None = 0.0
        elif first is None:
            first, eta_s = (time.monotonic(), done), None
        else:
            share = (done - first[1]) / (whole - first[1])
            seconds = time.monotonic() - first[0]
            eta_s = seconds * (1 - share) / share if share >= 0.1 else None
        on_progress(WorkProgress(description, done, whole, unit, eta_s))

    return report
