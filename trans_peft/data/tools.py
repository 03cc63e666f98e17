"""Read the field `tools` of a chat row: the functions that its prompt offers, as JSON schemas.

They are what transformers' `apply_chat_template(tools=...)` takes. An example has them as JSON
text, because the order of keys is part of the prompt.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from trans_peft.domain.untrusted_json import check_depth, parse_json, unique_object

__all__ = ["tools_reasons", "tools_text"]

_EXPECTED = "tools must be a list of JSON schemas, each an object, or the JSON text of such a list"


def tools_text(value: Any) -> str:
    """Return valid tools as JSON text; "" for none."""
    if not value:
        return ""
    found = json.loads(value) if isinstance(value, str) else value
    return json.dumps(found, ensure_ascii=False) if found else ""


def tools_reasons(value: Any) -> Iterator[str]:
    """Yield why tools are invalid.

    A null in a list that is not JSON text is refused: Parquet writes one for each field that
    another row has, and a template would write it into the prompt.
    """
    if not value:
        return
    is_text = isinstance(value, str)
    try:
        found = parse_json(value, object_pairs_hook=unique_object) if is_text else value
        check_depth(found)
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError) as error:
        yield f"tools must be JSON: {str(error)[:200]}"
        return
    if not isinstance(found, list) or not all(isinstance(t, dict) and t for t in found):
        yield f"{_EXPECTED}, found {type(found).__name__}"
    elif not is_text and _has_null(found):
        yield (
            "tools has fields that are null, as Parquet writes them for fields of other rows; "
            "give tools as JSON text"
        )


def _has_null(value: Any) -> bool:
    items = value.values() if isinstance(value, Mapping) else value
    return any(
        item is None or (isinstance(item, (dict, list)) and _has_null(item)) for item in items
    )
