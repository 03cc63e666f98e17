"""From an `AdapterSpec` to a PEFT config and back, and onto a model.

PEFT ignores some misspelt settings and changes a model before it notices others. Here every option
is checked against the config class first, and a model either gets the whole adapter or stays as it
was.
"""

import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from trans_peft.domain.adapter import AdapterSpec
from trans_peft.errors import InvalidSpecError
from trans_peft.methods.allocation import BoundedAllocation
from trans_peft.methods.patterns import check_options, names_of
from trans_peft.methods.registration import register_methods
from trans_peft.surface import Surface

__all__ = ["attach", "to_config", "to_spec"]

_ROOM = 1 << 26  # elements that any adapter may have; on a larger base, as many as the base has
_NOT_OPTIONS = {  # fields that say where a config came from, not what the adapter is
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
}


def to_config(spec: AdapterSpec) -> PeftConfig:
    """Return the PEFT config of a spec, for causal language modelling.

    InvalidSpecError names every unknown type or option and every value of the wrong kind, and what
    there is instead.
    """
    register_methods()
    if spec.peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = sorted(str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING)
        raise InvalidSpecError(
            "there is no such type of adapter", expected=", ".join(known), found=spec.peft_type
        )
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[spec.peft_type]
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
    options = sorted(set(fields) - _NOT_OPTIONS)
    unknown = sorted(set(spec.options) - set(options))
    problems = [f"{spec.peft_type} has no option {name!r}" for name in unknown]
    if unknown:
        problems.append(f"its options are {', '.join(options)}")
    types = typing.get_type_hints(config_class)
    for name, value in spec.options.items():
        kind = types.get(name)
        if name in options and kind in (bool, int, float, str) and not _is_a(value, kind):
            problems.append(f"{name} must be {kind.__name__}, not {value!r}")
    if problems:
        raise InvalidSpecError(f"the adapter cannot be built: {'; '.join(problems)}")
    try:
        return config_class(task_type=TaskType.CAUSAL_LM, **_plain(spec.options))
    except (TypeError, ValueError, ImportError) as error:
        raise InvalidSpecError(f"PEFT refuses the {spec.peft_type} adapter: {error}") from error


def to_spec(config: PeftConfig) -> AdapterSpec:
    """Return the spec of a PEFT config: its type, and the options that are not PEFT's defaults.

    Sets become sorted lists, so that equal configs give equal specs. `to_config` takes it back.
    """
    options = {}
    for field in dataclasses.fields(config):
        if field.name in _NOT_OPTIONS or not field.init:
            continue
        value = getattr(config, field.name)
        default = (
            field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
        )
        if value != default:
            options[field.name] = _plain(value)
    peft_type = config.peft_type
    return AdapterSpec(str(getattr(peft_type, "value", peft_type)), options)


def attach(model: nn.Module, spec: AdapterSpec) -> PeftModel:
    """Put a new adapter on a model, named "default", and return the PEFT model around it.

    Its initial weights come from torch's global generator. InvalidSpecError, and an unchanged
    model, where an adapter is already there, a target module is not, or PEFT cannot adapt one.
    """
    config = to_config(spec)
    if isinstance(model, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise InvalidSpecError(
            "the model already has an adapter",
            do="load the base again, or take the adapter off with unload()",
        )
    subject = f"the {spec.peft_type} adapter"
    check_options(spec.options, [*names_of(model)], subject)
    missing = _missing_targets(model, config)
    if missing:
        raise InvalidSpecError(
            f"target_modules that the model does not have: {', '.join(missing)}",
            expected=f"some of {', '.join(_names(model))}",
        )
    surface = Surface(model)
    room = max(_ROOM, sum(parameter.numel() for parameter in model.parameters()))
    try:
        with BoundedAllocation(room, subject):
            return get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        surface.restore()
        raise InvalidSpecError(
            f"PEFT cannot put the {spec.peft_type} adapter on {type(model).__name__}: {error}"
        ) from error


def _is_a(value: object, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _plain(value: Any) -> Any:
    """Return a value as JSON would keep it."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    return value


def _missing_targets(model: nn.Module, config: PeftConfig) -> list[str]:
    names = [name for name, _ in model.named_modules()]
    missing = []
    for field in ("target_modules", "feedforward_modules", "modules_to_save"):
        targets = getattr(config, field, None)
        if isinstance(targets, str):
            found = targets == "all-linear" or any(re.fullmatch(targets, name) for name in names)
            missing += [] if found else [targets]
        else:
            missing += [
                target
                for target in sorted(targets or ())
                if not any(name == target or name.endswith(f".{target}") for name in names)
            ]
    return list(dict.fromkeys(missing))


def _names(model: nn.Module) -> list[str]:
    """Return the last names of the modules that hold weights, each once, in their order."""
    held = (
        name for name, module in model.named_modules() if any(True for _ in module.parameters())
    )
    last = (name.rpartition(".")[2] for name in held)
    return list(dict.fromkeys(name for name in last if name and not name.isdigit()))
