"""A comparison as a picture: difference, bounds and margin on one axis of points.

Positions are percentages of the picture's width, so that its text has the same size at every width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite

from trans_peft.domain.evaluation import Comparison, SuiteJudgment

__all__ = ["Interval", "Picture", "picture"]

_LEFT, _RIGHT = 3.0, 97.0
_STEPS = (0.5, 1, 2, 5, 10, 20, 25, 50, 100)
_MAX_TICKS = 7


@dataclass(frozen=True)
class Interval:
    """One comparison. Positions in percent of the width; infinite bounds are at the edge.

    Attributes:
        name: What the adapter is compared with.
        difference: Position of the difference.
        lower: Position of the lower bound.
        upper: Position of the upper bound.
        is_open_below: Whether there is no lower bound.
        is_open_above: Whether there is no upper bound.
        limit: Position of the margin that the test compares a bound with. None if it is unknown.
        result: `good`, `bad` or `open`: what the test showed.
        text: The figures as text.
    """

    name: str
    difference: float
    lower: float
    upper: float
    is_open_below: bool
    is_open_above: bool
    limit: float | None
    result: str
    text: str


@dataclass(frozen=True)
class Picture:
    """The picture of one suite.

    Attributes:
        zero: Position of no difference.
        ticks: (position, label) of the axis.
        intervals: One row for each comparison.
        description: All figures as one text, for screen readers.
    """

    zero: float
    ticks: tuple[tuple[float, str], ...]
    intervals: tuple[Interval, ...]
    description: str


def picture(suite: SuiteJudgment, margin_points: float | None) -> Picture:
    """Return the picture of one suite's comparisons. Without a margin, no limit is drawn."""
    named = [
        ("the old base", suite.versus_old_base, margin_points and -margin_points),
        ("the bare new base", suite.versus_bare_base, margin_points),
        ("a fresh adapter", suite.versus_fresh_adapter, margin_points and -margin_points),
    ]
    shown = [(name, found, limit) for name, found, limit in named if found is not None]
    values = [0.0, *(limit for _, _, limit in shown if limit is not None)]
    for _, found, _ in shown:
        values += [v for v in (found.difference, found.lower, found.upper) if isfinite(v)]
    low, high = min(values), max(values)
    room = max(high - low, 1.0) * 0.06
    axis = _Axis(low - room, high + room)
    intervals = tuple(
        _interval(name, found, limit, axis, is_bare=found is suite.versus_bare_base)
        for name, found, limit in shown
    )
    description = f"{suite.suite}: " + "; ".join(f"{i.name}: {i.text}" for i in intervals)
    return Picture(axis(0.0), axis.ticks(), intervals, description)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float

    def __call__(self, points: float) -> float:
        share = (min(max(points, self.low), self.high) - self.low) / (self.high - self.low)
        return round(_LEFT + share * (_RIGHT - _LEFT), 2)

    def ticks(self) -> tuple[tuple[float, str], ...]:
        length = self.high - self.low
        step = next((s for s in _STEPS if length / s < _MAX_TICKS), _STEPS[-1])
        numbers: Sequence[int] = range(ceil(self.low / step), floor(self.high / step) + 1)
        return tuple((self(n * step), _signed(n * step)) for n in numbers)


def _interval(
    name: str, found: Comparison, limit: float | None, axis: _Axis, *, is_bare: bool
) -> Interval:
    if is_bare:
        result = "good" if found.superior else "bad" if found.reference_non_inferior else "open"
    else:
        result = "good" if found.non_inferior else "bad" if found.inferior else "open"
    return Interval(
        name=name,
        difference=axis(found.difference),
        lower=axis(found.lower),
        upper=axis(found.upper),
        is_open_below=not isfinite(found.lower),
        is_open_above=not isfinite(found.upper),
        limit=None if limit is None else axis(limit),
        result=result,
        text=f"{_points(found.difference)}, bounds {_points(found.lower)} to "
        f"{_points(found.upper)}",
    )


def _points(value: float) -> str:
    """Return a difference with a sign and one decimal; "none" for a bound that does not exist."""
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}") if isfinite(value) else "none"


def _signed(value: float) -> str:
    return "0" if value == 0 else f"{value:+g}".replace("-", "\N{MINUS SIGN}")
