"""Read and write docs/architectures.md, the page with the outcomes."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import transformers

from benchmarks.architectures.outcomes import ArchitectureOutcome

__all__ = ["PAGE", "read", "write"]

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
_BEGIN = "<!-- written by python -m benchmarks.architectures -->"
_END = "<!-- end -->"
_ROW = re.compile(r"^\| `(?P<name>[^`]+)` \| [^|]+ \| (?P<outcome>[^|]+) \| (?P<detail>.*) \|$")


def write(outcomes: Sequence[ArchitectureOutcome]) -> None:
    """Replace the part of the page that the command writes."""
    text = PAGE.read_text()
    head, tail = text[: text.index(_BEGIN)], text[text.index(_END) :]
    PAGE.write_text("\n".join([f"{head}{_BEGIN}", "", *_table(outcomes), "", tail]))


def read() -> dict[str, ArchitectureOutcome]:
    """Return the outcomes of the page, by architecture."""
    rows = map(_ROW.match, PAGE.read_text().splitlines())
    return {
        row["name"]: ArchitectureOutcome(row["name"], row["outcome"], row["detail"].strip())
        for row in rows
        if row is not None
    }


def _table(outcomes: Sequence[ArchitectureOutcome]) -> Iterator[str]:
    counts = Counter(row.outcome for row in outcomes)
    counted = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    yield f"transformers {transformers.__version__}, {len(outcomes)} architectures: {counted}."
    yield ""
    yield "| model type | class | outcome | why |"
    yield "| -- | -- | -- | -- |"
    for outcome in outcomes:
        yield outcome.row
