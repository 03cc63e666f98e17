"""A comparison as a picture: difference, bounds and margin on an axis of points.

Positions are percentages of the picture's width, so that its text has the same size at every width.
"""

from dataclasses import dataclass
from math import ceil, floor

from trans_peft.domain.evaluation import Comparison
from trans_peft.ui.figures import finite

__all__ = ["Picture", "picture"]

_LEFT, _RIGHT = 4.0, 96.0
_LARGEST = 100.0  # scores lie in [0, 100], so no difference of two scores is larger
_STEPS = (0.5, 1, 2, 5, 10, 20, 25, 50, 100)
_MAX_TICKS = 7
_ROOM = 0.08  # of the axis, at both ends


@dataclass(frozen=True)
class Picture:
    """One comparison. Positions in percent of the width; a bound that does not exist is at the end.

    Figures beyond 100 points are at the end, too.

    Attributes:
        difference: Position of the difference. None if it is unknown.
        lower: Position of the lower bound.
        upper: Position of the upper bound.
        is_open_below: Whether there is no lower bound.
        is_open_above: Whether there is no upper bound.
        zero: Position of no difference.
        limit: Position of the margin that the tests compare a bound with. None if it is unknown.
        ticks: (position, label) of the axis.
        result: `good`, `bad` or `open`: what the tests showed.
    """

    difference: float | None
    lower: float
    upper: float
    is_open_below: bool
    is_open_above: bool
    zero: float
    limit: float | None
    ticks: tuple[tuple[float, str], ...]
    result: str


def picture(found: Comparison, limit: float | None, result: str) -> Picture:
    """Return the picture of a comparison. `limit` in points; None: no margin is drawn."""
    difference, lower, upper = map(finite, (found.difference, found.lower, found.upper))
    known = [v for v in (difference, lower, upper, limit, 0.0) if v is not None]
    values = [min(max(v, -_LARGEST), _LARGEST) for v in known]
    room = max(max(values) - min(values), 1.0) * _ROOM
    axis = _Axis(min(values) - room, max(values) + room)
    return Picture(
        difference=None if difference is None else axis.position(difference),
        lower=axis.position(axis.low if lower is None else lower),
        upper=axis.position(axis.high if upper is None else upper),
        is_open_below=lower is None,
        is_open_above=upper is None,
        zero=axis.position(0.0),
        limit=None if limit is None else axis.position(limit),
        ticks=axis.ticks(),
        result=result,
    )


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float

    def position(self, points: float) -> float:
        share = (min(max(points, self.low), self.high) - self.low) / (self.high - self.low)
        return round(_LEFT + share * (_RIGHT - _LEFT), 2)

    def ticks(self) -> tuple[tuple[float, str], ...]:
        length = self.high - self.low
        step = next((s for s in _STEPS if length / s < _MAX_TICKS), _STEPS[-1])
        numbers = range(ceil(self.low / step), floor(self.high / step) + 1)
        return tuple((self.position(n * step), _signed(n * step)) for n in numbers)


def _signed(value: float) -> str:
    return "0" if value == 0 else f"{value:+g}".replace("-", "\N{MINUS SIGN}")
