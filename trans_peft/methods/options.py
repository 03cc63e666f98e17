"""Options of an adapter that can be checked without a model: types, ranges, what is supported."""

import dataclasses
import json
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from peft import PeftConfig
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

__all__ = ["not_evaluable", "not_trainable", "option_problems", "saved_problems"]

_NOT_EVALUATED: Mapping[str, str] = {  # methods and options
    "LILY": "its routing averages over a whole batch, so that an answer depends on its neighbours",
    "MULTITASK_PROMPT_TUNING": "it needs a task id with every row",
    "POLY": "it needs a task id with every row",
    "SHADOW": "it carries a second model, whose cache evaluation does not keep",
    "XLORA": "it loads other adapters from paths of its configuration",
    "alora_invocation_tokens": "batched evaluation does not track where the adapter is active",
    "arrow_config": "it routes between other adapters, which are not part of this one",
    "kasa_config": "it rewrites the weights of the base",
    "layer_replication": "the replicated layers do not exist in the base",
    "megatron_config": "the model does not run in Megatron",
}
_NOT_TRAINED: Mapping[str, str] = {
    "ADAMSS": "the shapes of its weights depend on the base's weights, so no other base fits",
    "ADALORA": "its ranks change by a call after each step, which training does not make",
    "monteclora_config": "its loss term is not part of the training loss",
    "use_asa": "its budget changes by a call after each step, which training does not make",
}
_INITS = {
    "corda": "it needs statistics of the data, collected before training",
    "eva": "it needs statistics of the data, collected before training; PEFT starts like LoRA",
    "loftq": "it rewrites the weights of the base",
    "lora_ga": "it needs gradients, collected before training, and rewrites the base",
    "olora": "it rewrites the weights of the base",
    "pissa": "it rewrites the weights of the base",
}
_NEEDS = {  # options that PEFT reads only where another one is set
    "qalora_group_size": "use_qalora",
    "megatron_core": "megatron_config",
    "rank_dropout_scale": "rank_dropout",
}


def not_evaluable(peft_type: str, options: Mapping[str, Any]) -> list[str]:
    """Return why a saved adapter could not be evaluated on a base, one text a reason."""
    return _listed_in(_NOT_EVALUATED, peft_type, options)


def not_trainable(peft_type: str, options: Mapping[str, Any]) -> list[str]:
    """Return why an adapter could not be trained, saved and evaluated, one text a reason."""
    problems = _listed_in({**_NOT_EVALUATED, **_NOT_TRAINED}, peft_type, options)
    init = str(options.get("init_lora_weights", "")).lower()
    problems += [
        f"init_lora_weights={init!r} is not supported: {why}"
        for name, why in _INITS.items()
        if init == name or init.startswith(f"{name}_niter")
    ]
    if options.get("bias", "none") != "none":
        problems.append(
            f"bias={options['bias']!r} is not supported: it trains biases of the base, which every "
            "other adapter shares; lora_bias=True gives the adapter biases of its own"
        )
    return problems


def _listed_in(reasons: Mapping[str, str], peft_type: str, options: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is not supported: {why}"
        for name, why in reasons.items()
        if name == peft_type or options.get(name) not in (None, False)
    ]


def saved_problems(config_class: type[PeftConfig], options: Mapping[str, Any]) -> list[str]:
    """Return a problem for each field of an adapter_config.json that has another type than PEFT's.

    More is allowed than in a spec, because PEFT saved it: numbers may be fractions where PEFT
    declares whole ones, and literal values may be those of another version.
    """
    problems = []
    types = typing.get_type_hints(config_class)
    for name, value in options.items():
        kind = str(types.get(name, "Any"))
        fraction = isinstance(value, float) and "int" in kind
        word = isinstance(value, str) and "Literal" in kind
        sub_config = isinstance(value, dict) and "config" in name
        if name in types and not (fraction or word or sub_config):
            wrong = _wrong_type(types[name], value)
            problems += [] if wrong is None else [
                f"{name} must be {_named(types[name])}, not {value!r}{wrong}"
            ]  # fmt: skip
        if name.endswith("_pattern") and isinstance(value, Mapping):
            problems += [
                f"{name}: {key!r} must have a number, not {item!r}"
                for key, item in value.items()
                if isinstance(item, bool) or not isinstance(item, int | float | list)
            ]
    return problems


def option_problems(config_class: type[PeftConfig], options: Mapping[str, Any]) -> list[str]:
    """Return a problem for each option that has another type than PEFT declares, or no sense.

    `options` are plain JSON values. PEFT itself checks few types; a wrong one fails late or changes
    the adapter.
    """
    return [
        problem
        for name, value in options.items()
        for problem in _problems(name, value, options, typing.get_type_hints(config_class))
    ]


def _problems(
    name: str, value: Any, options: Mapping[str, Any], types: Mapping[str, Any]
) -> Iterator[str]:
    if name not in types:
        return
    if (wrong := _wrong_type(types[name], value)) is not None:
        yield f"{name} must be {_named(types[name])}, not {value!r}{wrong}"
        return
    if "dropout" in name and isinstance(value, float | int) and not isinstance(value, bool):
        if not 0 <= value < 1:
            yield f"{name} must lie in [0, 1), not {value!r}"
    elif name.endswith("_pattern") and isinstance(value, Mapping):
        whole = not name.startswith(("alpha", "lambda"))
        for key, item in value.items():
            if not _positive(item, whole=whole and not _takes_float(types[name])):
                yield f"{name}: {key!r} must have a positive number, not {item!r}"
    elif name in ("layers_to_transform", "token_indices") and _any_negative(value):
        yield f"{name} must not be negative: {value!r}"
    if value and name in _NEEDS and not options.get(_NEEDS[name]):
        yield f"{name} has no effect without {_NEEDS[name]}"


def _wrong_type(kind: Any, value: Any) -> str | None:
    """Return what is wrong with a value of a declared type ("" for the type alone), or None."""
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return ", which is not finite" if isinstance(value, float) else ""
    try:
        TypeAdapter(kind).validate_json(text, strict=True)
    except PydanticSchemaGenerationError:
        return None
    except ValidationError as error:
        if dataclasses.is_dataclass(kind):
            return f" ({error.errors()[0]['msg']})"
        return ""
    return None


def _named(kind: Any) -> str:
    if isinstance(kind, type):
        return kind.__name__
    return str(kind).replace("typing.", "").replace("NoneType", "None")


def _takes_float(kind: Any) -> bool:
    return "float" in str(kind)


def _positive(value: Any, *, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return math.isfinite(value) and value > 0


def _any_negative(value: Any) -> bool:
    return any(index < 0 for index in ([value] if isinstance(value, int) else value or ()))
