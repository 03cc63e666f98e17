"""Figures of outcomes. Tags of the registry contain any number, also NaN and infinities."""

from math import isfinite

__all__ = ["finite"]


def finite(value: float | None) -> float | None:
    """Return a number; None, which is unknown, for NaN, an infinity and None."""
    return value if value is not None and isfinite(value) else None
