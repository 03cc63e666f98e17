"""Content hashes of nouns: the same value, the same hash, in every process on every machine."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

from trans_peft.errors import InvalidSpecError

__all__ = ["ADDED_LATER", "content_sha256"]

ADDED_LATER: Mapping[str, Any] = {"added_later": True}
"""Metadata of a dataclass field that came when hashes of its noun were already stored: it counts
only where it differs from its default, so that the hashes of nouns without it stay as they are."""


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        return {
            field.name: _plain(item)
            for field, item in held
            if not ("added_later" in field.metadata and item == field.default)
        }
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def content_sha256(value: Any) -> str:
    """Return the sha256 (64 hex digits) of a noun's canonical JSON.

    Keys are sorted, tuples and lists are one, sets are sorted.

    Raises:
        TypeError: for a value of a type that JSON does not have.
        InvalidSpecError: for an infinite number or NaN, which JSON does not have either.
    """
    try:
        text = json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise InvalidSpecError(
            "a value has no content hash",
            expected="finite numbers",
            found=str(error),
            do="look for NaN or an infinite number in the recipe, suite or policy",
        ) from error
    return hashlib.sha256(text.encode()).hexdigest()
