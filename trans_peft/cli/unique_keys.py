"""Parse JSON and YAML, and refuse mappings with a repeated key.

Both formats leave it to the parser which of the values counts, and the usual parsers take the last
one without a word. Values nested more than 100 levels deep are refused as well, because parsers and
checks are recursive; a YAML anchor that contains itself is one.
"""

from typing import Any

import yaml

from trans_peft.domain import untrusted_json
from trans_peft.domain.bounds import MAX_JSON_DEPTH

__all__ = ["parse_json", "parse_yaml"]


def parse_json(text: str) -> Any:
    """Parse JSON. Raises ValueError for other text, a repeated key, or values nested too deep."""
    return untrusted_json.parse_json(text, object_pairs_hook=untrusted_json.unique_object)


def parse_yaml(text: str) -> Any:
    """Parse YAML. Raises yaml.YAMLError for other text, or if a mapping repeats a key.

    A key beside `<<` may replace a merged one. Raises ValueError for values nested too deep.
    """
    try:
        value = yaml.load(text, _Loader)  # noqa: S506  a SafeLoader
    except RecursionError as error:
        raise ValueError(f"nested more than {MAX_JSON_DEPTH} levels deep") from error
    untrusted_json.check_depth(value, has_aliases=True)
    return value


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with unique keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is repeated in one mapping", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)
