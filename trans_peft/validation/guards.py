"""Read the names of sandbox guards from settings."""

from collections.abc import Collection

from trans_peft.errors import InvalidSpecError
from trans_peft.sandbox.guards import Guard

__all__ = ["guards_named"]


def guards_named(names: Collection[str]) -> frozenset[Guard]:
    """Return the guards with these names. InvalidSpecError for a name that no guard has."""
    unknown = sorted({*names} - {*map(str, Guard)})
    if unknown:
        raise InvalidSpecError(
            "the sandbox has no such guard", expected=", ".join(Guard), found=", ".join(unknown)
        )
    return frozenset(map(Guard, names))
