"""Parse adapter_config.json strictly: unambiguous JSON, with fields of the expected types.

PEFT checks few types and accepts repeated keys and NaN. These checks need neither torch nor PEFT;
`trans_peft.methods.options` checks the options of each method.
"""

import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from trans_peft.domain.excerpts import excerpt
from trans_peft.domain.untrusted_json import duplicates, parse_json
from trans_peft.errors import listed

__all__ = ["parse_adapter_config"]

_TEXTS = ("base_model_name_or_path", "revision", "task_type", "peft_version")
_NAMES = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern")
_LISTS = ("modules_to_save", "target_parameters")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def parse_adapter_config(data: bytes) -> dict[str, Any]:
    """Return the fields of an adapter_config.json.

    Raises ValueError with every problem: not UTF-8 or JSON, nested too deeply, a repeated key, a
    number that is not finite, text that is not Unicode (a lone surrogate), no `peft_type`, or a
    field that does not have the type that PEFT declares.
    """
    try:
        config = parse_json(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_not_finite,
            parse_float=_finite,
        )
        json.dumps(config, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("it contains text that is not Unicode: a lone surrogate") from error
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"it must be a JSON object, not a {type(config).__name__}")
    problems = list(_problems(config))
    if problems:
        raise ValueError("; ".join(problems))
    return config


def _problems(config: Mapping[str, Any]) -> Iterable[str]:
    if not isinstance(config.get("peft_type"), str) or not config["peft_type"]:
        yield f"peft_type must be a name, not {_SHORT.repr(config.get('peft_type'))}"
    for name in _TEXTS:
        if not isinstance(config.get(name), str | None):
            yield f"{name} must be text, not {_SHORT.repr(config[name])}"
    for name in _NAMES:
        if not isinstance(config.get(name), str | None) and not _texts(config[name]):
            yield f"{name} must be text or a list of texts, not {_SHORT.repr(config[name])}"
    for name in _LISTS:
        if config.get(name) is not None and not _texts(config[name]):
            yield f"{name} must be a list of texts, not {_SHORT.repr(config[name])}"
    for name, value in config.items():
        by_module = name.endswith("_pattern") and name != "layers_pattern"
        if by_module and not isinstance(value, dict | None):
            yield f"{name} must map patterns to numbers, not {_SHORT.repr(value)}"


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = duplicates(name for name, _ in pairs)
        raise ValueError(f"repeated keys: {listed([excerpt(n, 60) for n in twice])}")
    return fields


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _not_finite(text)


def _not_finite(text: str) -> float:
    raise ValueError(f"{text} is not a finite number")
