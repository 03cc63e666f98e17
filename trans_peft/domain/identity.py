"""Content hashes of domain values, equal in every process and on every machine."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

from trans_peft.errors import InvalidSpecError

__all__ = ["ADDED_LATER", "content_sha256", "json_value"]

ADDED_LATER: Mapping[str, Any] = {"added_later": True}
"""Metadata of a dataclass field that was added after hashes of its class had been stored.

Such a field is part of the hash, and of stored JSON, only if its value differs from its default.
The hashes of values that existed before the field therefore do not change, and older code reads
values that do not use it. The default must never change.
"""


def json_value(value: Any) -> Any:
    """Return a value as JSON represents it; sets become sorted lists.

    Fields that are `ADDED_LATER` are left out if they have their default.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        return {
            field.name: json_value(item)
            for field, item in held
            if not ("added_later" in field.metadata and item == field.default)
        }
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(json_value(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    return value


def content_sha256(value: Any) -> str:
    """Return the sha256 (64 hexadecimal digits) of a value's canonical JSON.

    Keys are sorted, tuples equal lists, and sets are sorted.

    Raises:
        TypeError: a value has a type that JSON cannot represent.
        InvalidSpecError: a number is infinite or NaN.
    """
    try:
        text = json.dumps(json_value(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise InvalidSpecError(
            "the recipe, suite or policy contains NaN or an infinite number",
            expected="finite numbers",
            found=str(error),
            do="correct that number",
        ) from error
    return hashlib.sha256(text.encode()).hexdigest()
