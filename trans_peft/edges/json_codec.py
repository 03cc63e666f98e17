"""Serialize domain objects as JSON, and validate them when they are read.

Infinities and NaN are preserved. A field that was added to a class later (`ADDED_LATER`) is written
only if its value differs from its default, so that workers with older code can read what they would
have written themselves.
"""

import json
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from trans_peft.domain.identity import json_value
from trans_peft.errors import IntegrityError

__all__ = ["from_json", "to_json"]


def to_json(value: Any) -> str:
    """Return a domain object, or a sequence of them, as JSON.

    TypeError for a value that JSON cannot represent.
    """
    return json.dumps(json_value(value))


def from_json(kind: Any, text: str, *, where: str) -> Any:
    """Return the value of type `kind`. IntegrityError, which names `where`, if it is invalid."""
    try:
        return _adapter(kind).validate_json(text)
    except (ValidationError, ValueError) as error:
        raise IntegrityError(f"{where} cannot be read", found=str(error)) from error


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
