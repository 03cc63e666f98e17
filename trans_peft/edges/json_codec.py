"""Nouns as JSON and back, checked on the way in; infinities and NaN survive."""

import json
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from trans_peft.errors import IntegrityError

__all__ = ["from_json", "to_json"]


def to_json(kind: Any, noun: Any) -> str:
    """Return a noun (or a tuple of nouns) of that kind as JSON."""
    return json.dumps(_adapter(kind).dump_python(noun, mode="json"))


def from_json(kind: Any, text: str, *, where: str) -> Any:
    """Return the noun of that kind. IntegrityError, with `where` it stood, if it is none."""
    try:
        return _adapter(kind).validate_json(text)
    except (ValidationError, ValueError) as error:
        raise IntegrityError(f"{where} cannot be read", found=str(error)) from error


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
