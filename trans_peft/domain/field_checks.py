"""Checks of single fields, which return all problems instead of raising for the first."""

from typing import Any, get_args

from trans_peft.domain.numbers import is_finite_number

__all__ = ["choice_problems", "count_problems", "interval_problems", "is_whole"]


def is_whole(value: Any) -> bool:
    """Return whether a value is an int and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def count_problems(settings: Any, ranges: dict[str, tuple[int, int]]) -> list[str]:
    """Return a problem for each field that is not a whole number in its range."""
    return [
        f"{name} must be a whole number from {low} to {high:,}, not {value!r}"
        for name, (low, high) in ranges.items()
        if not (is_whole(value := getattr(settings, name)) and low <= value <= high)
    ]


def interval_problems(settings: Any, intervals: dict[str, tuple[float, float]]) -> list[str]:
    """Return a problem for each field that is not a number of its interval [low, high)."""
    return [
        f"{name} must lie in [{low:g}, {high:g}), not {value!r}"
        for name, (low, high) in intervals.items()
        if not (is_finite_number(value := getattr(settings, name)) and low <= value < high)
    ]


def choice_problems(settings: Any, **choices: Any) -> list[str]:
    """Return a problem for each field whose value is not one of its literals."""
    return [
        f"{name} must be one of {', '.join(get_args(kind))}, not {getattr(settings, name)!r}"
        for name, kind in choices.items()
        if getattr(settings, name) not in get_args(kind)
    ]
