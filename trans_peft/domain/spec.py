"""How an adapter is configured."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.errors import InvalidSpecError, listed

__all__ = ["MAX_OPTION_DEPTH", "AdapterSpec"]

MAX_OPTION_DEPTH = 16
"""Levels of nesting among an adapter's options. PEFT's own options have at most three."""

_MAX_INTEGER = 1 << 64
_SHOWN = 10


@dataclass(frozen=True)
class AdapterSpec:
    """A PEFT configuration: the method and its options.

    InvalidSpecError for a type that is not in upper case and for options that JSON cannot
    represent: keys that are not strings, numbers that are not finite, objects, and values nested
    more than `MAX_OPTION_DEPTH` levels deep. `trans_peft.methods.specs.to_config` checks the
    options against PEFT.

    Attributes:
        peft_type: PEFT's name of the method, as `peft_type` in adapter_config.json ("LORA").
        options: fields of PEFT's configuration class (`r`, `lora_alpha`, `target_modules`, ...)
            as JSON values; tuples and sets count as lists.

    Example:
        >>> AdapterSpec("LORA", {"r": 8, "target_modules": ["q_proj", "v_proj"]})
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    peft_type: str = "LORA"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = self.peft_type
        if not isinstance(name, str) or not name or name != name.upper():
            raise InvalidSpecError(
                "peft_type is not one of PEFT's names of methods",
                expected="upper case, such as LORA",
                found=repr(name)[:80],
                do="copy the value of peft_type from an adapter_config.json",
            )
        if not isinstance(self.options, Mapping):
            raise InvalidSpecError(
                f"the options of the {name} adapter are not a mapping",
                expected="names of options with their values, such as {'r': 8}",
                found=f"{type(self.options).__name__}: {repr(self.options)[:80]}",
            )
        if problems := _not_json(self.options):
            raise InvalidSpecError(
                f"the options of the {name} adapter cannot be written as JSON",
                expected="null, booleans, finite numbers, strings, lists, and mappings with "
                f"string keys, nested at most {MAX_OPTION_DEPTH} levels deep",
                found=listed(problems, _SHOWN),
                do="correct these options",
            )


def _not_json(options: Mapping[Any, Any]) -> list[str]:
    """Return a problem for each value that JSON cannot represent, with its dotted path."""
    problems = []
    pending: list[tuple[str, Any, int]] = [("options", options, 0)]
    while pending:
        path, value, depth = pending.pop()
        if depth > MAX_OPTION_DEPTH:
            return [f"{path[:80]}: nested more than {MAX_OPTION_DEPTH} levels deep"]
        if isinstance(value, Mapping):
            for key, item in value.items():
                if isinstance(key, str):
                    pending.append((f"{path}.{key}", item, depth + 1))
                else:
                    problems.append(f"{path}: the key {repr(key)[:80]} is not a string")
        elif isinstance(value, list | tuple | set | frozenset):
            pending += [(path, item, depth + 1) for item in value]
            if isinstance(value, set | frozenset) and len({type(item) for item in value}) > 1:
                problems.append(f"{path}: a set of values of several types has no order")
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{path}: {value} is not finite")
        elif isinstance(value, int) and abs(value) > _MAX_INTEGER:
            problems.append(f"{path}: a whole number beyond 2**64")
        elif value is not None and not isinstance(value, bool | int | float | str):
            problems.append(f"{path}: a value of type {type(value).__name__}")
    return problems
