"""Parse JSON and YAML, and refuse mappings with a repeated key.

Both formats leave it to the parser which of the values counts, and the usual parsers take the last
one without a word.
"""

import json
from typing import Any

import yaml

from trans_peft.domain.untrusted_json import unique_object

__all__ = ["parse_json", "parse_yaml"]


def parse_json(text: str) -> Any:
    """Parse JSON. Raises ValueError if it is no JSON, or if an object repeats a key."""
    return json.loads(text, object_pairs_hook=unique_object)


def parse_yaml(text: str) -> Any:
    """Parse YAML. Raises yaml.YAMLError if it is no YAML, or if a mapping repeats a key.

    A key beside `<<` may replace a merged one.
    """
    return yaml.load(text, _Loader)  # noqa: S506  a SafeLoader


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
