"""JSON that was written outside of this library, parsed within bounds.

Python's `json` reads values that later code cannot handle: nesting close to the recursion limit
makes every recursive function fail, and a list of empty objects takes 25 times the memory of its
text. Both are refused here with a ValueError.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from trans_peft.domain.bounds import MAX_JSON_DEPTH, MAX_JSON_VALUES

__all__ = ["check_depth", "check_value_count", "duplicates", "parse_json", "unique_object"]


def parse_json(
    text: str,
    *,
    object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
    parse_constant: Callable[[str], Any] | None = None,
    parse_float: Callable[[str], Any] | None = None,
) -> Any:
    """Return the value of a JSON text; the hooks are those of `json.loads`.

    Raises ValueError for text that is not JSON, for values nested more than MAX_JSON_DEPTH levels
    deep, and for more than MAX_JSON_VALUES values.
    """
    check_value_count(text)
    try:
        value = json.loads(
            text,
            object_pairs_hook=object_pairs_hook,
            parse_constant=parse_constant,
            parse_float=parse_float,
        )
    except RecursionError as error:
        raise ValueError(f"nested more than {MAX_JSON_DEPTH} levels deep") from error
    check_depth(value)
    return value


def check_value_count(text: str) -> None:
    """Raise ValueError for a JSON text with more than MAX_JSON_VALUES values, without parsing it.

    Commas and brackets are counted, also those inside of strings.
    """
    count = sum(map(text.count, "[{,"))
    if count > MAX_JSON_VALUES:
        raise ValueError(f"about {count} values, at most {MAX_JSON_VALUES} are read")


def check_depth(value: Any, *, has_aliases: bool = False) -> None:
    """Raise ValueError for a parsed value nested more than MAX_JSON_DEPTH levels deep.

    With `has_aliases`, the value may contain one object many times, as YAML allows. It is then
    followed once on each level, which takes more memory.
    """
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_JSON_DEPTH):
        if not level:
            return
        level = [
            item
            for parent in level
            for item in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(item, (dict, list))
        ]
        if has_aliases:
            level = list({id(item): item for item in level}.values())
    if level:
        raise ValueError(f"nested more than {MAX_JSON_DEPTH} levels deep")


def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, as an `object_pairs_hook`. Raises ValueError if a key is repeated."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = duplicates(key for key, _ in pairs)
        raise ValueError(f"the key {twice[0][:60]!r} is repeated in one object")
    return found


def duplicates(names: Iterable[str]) -> list[str]:
    """Return the names that occur more than once, sorted; in linear time."""
    return sorted(name for name, count in Counter(names).items() if count > 1)
