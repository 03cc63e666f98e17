"""How the pages write figures, durations and states."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from urllib.parse import quote, urlencode

from trans_peft.ui.index import FleetQuery, State

__all__ = [
    "FILTERS",
    "SIGNS",
    "count",
    "duration",
    "percent",
    "points",
    "query_url",
    "score",
    "shortened",
]

_MINUS = "\N{MINUS SIGN}"
_LONGEST_TEXT = 60

SIGNS: Mapping[State, str] = {
    State.PASSED: "\N{CHECK MARK}",
    State.TRAINED: "\N{BLACK CIRCLE}",
    State.INCONCLUSIVE: "?",
    State.NEEDS_RETUNING: "\N{DOWNWARDS ARROW}",
    State.RETIRE: "\N{WHITE CIRCLE}",
    State.INCOMPATIBLE: "\N{NOT EQUAL TO}",
    State.FAILED: "!",
    State.MISSING: "\N{MIDDLE DOT}",
}
"""The sign of each state, so that no state is shown by its color alone."""


def points(value: float | None) -> str:
    """Return a difference in points with its sign, or a dash."""
    if value is None:
        return "\N{EN DASH}"
    rounded = round(value, 1)
    return "0.0" if rounded == 0 else f"{rounded:+.1f}".replace("-", _MINUS)


def score(value: float | None) -> str:
    """Return a score in points, or a dash."""
    return "\N{EN DASH}" if value is None else f"{value:.1f}"


def count(value: int) -> str:
    """Return a whole number with separators: 10,000."""
    return f"{value:,}"


def percent(share: float | None) -> str:
    """Return a share of 1 in percent: "80 %". "unknown" for None."""
    return "unknown" if share is None else f"{100 * share:.0f} %"


def duration(seconds: float | None) -> str:
    """Return a duration in its two largest units: "2 h 10 min". "unknown" for None."""
    if seconds is None:
        return "unknown"
    whole = round(seconds)
    for size, unit, small_size, small in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // small_size
            return f"{whole // size} {unit}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"


def shortened(text: str) -> str:
    """Return a text with at most 60 characters. Tags of MLflow may have very many."""
    return (
        text
        if len(text) <= _LONGEST_TEXT
        else f"{text[: _LONGEST_TEXT - 1]}\N{HORIZONTAL ELLIPSIS}"
    )


def query_url(path: str, query: FleetQuery, **changes: object) -> str:
    """Return a path with the fields of a query that differ from their defaults."""
    fields = query.model_dump(mode="json", exclude_defaults=True) | changes
    kept = {name: _text(value) for name, value in fields.items() if value not in ("", False, None)}
    if kept.get("page") == "1":
        del kept["page"]
    return f"{path}?{urlencode(kept)}" if kept else path


def _text(value: object) -> str:
    return "true" if value is True else str(value)


def _path_part(text: str) -> str:
    return quote(text, safe="")


def _pretty(value: object) -> str:
    return json.dumps(value, indent=2, default=str, ensure_ascii=False)


def _moment(value: datetime | str) -> str:
    """Return a time without its fractions of a second; a text that is no time as it is."""
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
        return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError):  # OverflowError: the year 1 in a zone east of UTC
        return str(value)


FILTERS = {
    "count": count,
    "duration": duration,
    "moment": _moment,
    "part": _path_part,
    "percent": percent,
    "points": points,
    "pretty": _pretty,
    "score": score,
    "shortened": shortened,
}
"""Filters of the templates by name."""
