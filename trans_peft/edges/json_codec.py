"""Serialize domain objects as JSON, and validate them when they are read.

Infinities and NaN are preserved.
"""

import json
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from trans_peft.errors import IntegrityError

__all__ = ["from_json", "to_json"]


def to_json(kind: Any, value: Any) -> str:
    """Return a value of type `kind`, such as `tuple[Suite, ...]`, as JSON."""
    return json.dumps(_adapter(kind).dump_python(value, mode="json"))


def from_json(kind: Any, text: str, *, where: str) -> Any:
    """Return the value of type `kind`. IntegrityError, which names `where`, if it is invalid."""
    try:
        return _adapter(kind).validate_json(text)
    except (ValidationError, ValueError) as error:
        raise IntegrityError(f"{where} cannot be read", found=str(error)) from error


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
