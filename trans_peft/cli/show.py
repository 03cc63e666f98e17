"""Output of the commands: tables, text and progress on a terminal, or one JSON value.

Names, verdicts and reasons come from a registry that other programs write. They are printed without
interpretation: not as rich's markup, and without characters that control a terminal.
"""

import re
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from trans_peft.domain.evaluation import Evaluation, Suite, Verdict, engine_lines
from trans_peft.domain.outcome import Compatibility, TransferOutcome

if TYPE_CHECKING:
    from trans_peft.lifecycle.progress import WorkProgress

__all__ = [
    "ProgressDisplay",
    "evaluation_table",
    "out",
    "print_compatibility",
    "print_json",
    "print_outcome",
    "print_wrapped",
    "printable",
    "progress",
    "stderr",
    "table",
]

_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Controls except tab and newline, marks that reverse the order of text, and halves of characters,
which cannot be encoded."""


def printable(text: str) -> str:
    r"""Return a text with `?` for each character that controls a terminal, such as ESC.

    >>> printable("passed\x1b[2J")
    'passed?[2J'
    """
    return _CONTROLS.sub("?", text)


class _Console(Console):
    """Prints every text, also the cells of tables, as `printable` returns it."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


out = _Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
stderr = _Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)

_QUIET_S = 10.0
_COLORS = {Verdict.PASSED: "green", Verdict.INCONCLUSIVE: "yellow", Verdict.RETIRE: "yellow"}


class ProgressDisplay:
    """Progress bars on a terminal. Elsewhere one line every ten seconds, and one at the end."""

    def __init__(self, bars: Bars | None) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._last_line = time.monotonic()

    def update(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` units of a job are done; `note` is the unit or a metric."""
        what, note = printable(what), printable(note)
        if self._bars is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=total, note="")
            self._bars.update(self._tasks[what], completed=done, total=total, note=note)
        elif done == total or time.monotonic() - self._last_line > _QUIET_S:
            self._last_line = time.monotonic()
            self.print_line(f"{what}: {done:,} of {total:,} {note}".rstrip())

    def print_line(self, line: str) -> None:
        """Print one line above the bars."""
        console = stderr if self._bars is None else self._bars.console
        console.print(line, style="dim")

    def work(self, reached: "WorkProgress") -> None:
        """Show the progress of an evaluation or of a recovery training."""
        self.update(reached.description, reached.done, reached.total, reached.summary)


@contextmanager
def progress() -> Iterator[ProgressDisplay]:
    """Show progress on stderr within the block."""
    if not stderr.is_terminal:
        yield ProgressDisplay(None)
        return
    with Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
    ) as bars:
        yield ProgressDisplay(bars)


def print_json(value: object) -> None:
    """Print one JSON value on stdout, with null for numbers that are not finite."""
    from pydantic_core import to_json

    print(to_json(value, indent=2, inf_nan_mode="null").decode())  # noqa: T201


def evaluation_table(evaluations: Iterable[Evaluation]) -> Table:
    """Return a table with a row per suite; scores in points."""
    shown = table("suite", "items", "score")
    for found in evaluations:
        shown.add_row(found.suite, str(len(found.items)), f"{found.score:.1f}")
    return shown


def print_compatibility(found: Compatibility) -> None:
    """Print whether the adapter is compatible, every mismatch and every note."""
    if found.ok:
        out.print("compatible", style="green")
    else:
        out.print(f"[red]not compatible[/]: {len(found.mismatches)} mismatches", markup=True)
    _print_lines("mismatch", found.mismatches)
    _print_lines("note", found.notes)


def print_outcome(outcome: TransferOutcome, suites: Iterable[Suite] = ()) -> None:
    """Print the results of each suite, the recovery strategies, the verdict and its reason."""
    chance = {suite.name: suite.chance_points for suite in suites}
    if outcome.judgment.suites:
        shown = table(
            *("suite", "items", "chance", "old base", "new base", "bare"),
            *("difference", "lower", "upper"),
        )
        for suite in outcome.judgment.suites:
            old, bare = suite.versus_old_base, suite.versus_bare_base
            shown.add_row(
                suite.suite,
                str(suite.items),
                "" if (points := chance.get(suite.suite)) is None else f"{points:.1f}",
                f"{old.reference_score:.1f}",
                f"{suite.score:.1f}",
                "" if bare is None else f"{bare.reference_score:.1f}",
                f"{old.difference:+.1f}",
                f"{old.lower:+.1f}",
                f"{old.upper:+.1f}",
            )
        out.print(shown)
    _print_lines("engine", engine_lines(outcome.judgment.suites))
    _print_lines("note", outcome.compatibility.notes)
    _print_lines("tried", [str(item) for item in outcome.tried])
    color = _COLORS.get(outcome.verdict, "red")
    out.print(f"verdict: [bold {color}]{outcome.verdict}[/]", markup=True)
    out.print(outcome.judgment.reason)


def _print_lines(label: str, lines: Sequence[str]) -> None:
    for line in lines:
        out.print(f"  {label}: {line}")


def table(*columns: str, texts: Collection[str] = ()) -> Table:
    """Return an empty table of numbers. Its first column and the columns `texts` are text."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        is_text = column == columns[0] or column in texts
        shown.add_column(column, justify="left" if is_text else "right", overflow="fold")
    return shown


def print_wrapped(shown: Table) -> None:
    """Print a table of sentences, wrapped at the width of the terminal, or at 120 characters."""
    out.print(shown, soft_wrap=False, width=120)
