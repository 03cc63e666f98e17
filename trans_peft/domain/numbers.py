"""Numbers in values that were written outside of this library."""

import sys
from typing import Any

__all__ = ["is_finite_number"]


def is_finite_number(value: Any) -> bool:
    """Return whether a value is an int or a float that a float can hold, and no bool.

    `math.isfinite` raises OverflowError for an int that no float can hold.

    >>> is_finite_number(2), is_finite_number(10**400), is_finite_number(float("nan"))
    (True, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max
