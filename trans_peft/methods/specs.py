"""Convert an `AdapterSpec` to a PEFT config and back, and attach a new adapter to a model.

PEFT ignores some options and rejects others only after it has changed the model. This module
checks every option first. A failed `attach` leaves the model unchanged.
"""

import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from trans_peft.domain.adapter import AdapterSpec
from trans_peft.domain.identity import json_value
from trans_peft.errors import InvalidSpecError, listed
from trans_peft.methods.allocation import BoundedAllocation
from trans_peft.methods.effects import unused_on_model
from trans_peft.methods.matching import (
    invalid_patterns,
    matching_names,
    unmatched_entries,
    unused_entries,
    unused_exclusions,
    weightless_entries,
)
from trans_peft.methods.options import not_trainable, option_problems
from trans_peft.methods.patterns import check_options, names_of
from trans_peft.methods.registration import register_methods
from trans_peft.snapshot import ModelSnapshot

__all__ = ["attach", "to_config", "to_spec"]

_MIN_ELEMENT_LIMIT = 1 << 26
"""Elements that any adapter may allocate. On a larger base, as many as the base has."""

_PASSED_ON = (InvalidSpecError, MemoryError, torch.OutOfMemoryError)
_HARMLESS_WARNINGS = (
    "merging LoRA weights",  # nothing is merged here
    "did not match any targeted module",  # ignores target_parameters; see `unused_entries`
    "instead they will be restored using the PRNG key",  # the intended use of projection_prng_key
    "`is_gradient_checkpointing` is deprecated",  # PEFT reads transformers' old name
)
_LINEAR = (nn.Linear, Conv1D)
_NOT_OPTIONS = {  # fields that record where a config came from
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
    "tokenizer_name_or_path",  # PEFT would open this path
}


def to_config(spec: AdapterSpec) -> PeftConfig:
    """Return the PEFT config of a spec, for causal language modeling.

    InvalidSpecError lists every unknown or unsupported method and option, every value of a wrong
    type or out of range, and every option that would have no effect.
    """
    register_methods()
    if spec.peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = sorted(str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING)
        raise InvalidSpecError(
            "PEFT has no such method",
            expected=", ".join(known),
            found=spec.peft_type,
            do="correct peft_type",
        )
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[spec.peft_type]
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
    options = sorted(set(fields) - _NOT_OPTIONS)
    unknown = sorted(set(spec.options) - set(options))
    problems = [f"{spec.peft_type} has no option {name!r}" for name in unknown]
    if unknown:
        problems.append(f"its options are {', '.join(options)}")
    known_options = {k: json_value(v) for k, v in spec.options.items() if k in options}
    problems += option_problems(config_class, spec.peft_type, known_options)
    problems += invalid_patterns(known_options) if not problems else []
    problems += not_trainable(spec.peft_type, known_options)
    if problems:
        raise InvalidSpecError(
            f"the {spec.peft_type} adapter cannot be built: {'; '.join(problems)}",
            do="correct or remove these options",
        )
    try:
        with _raising_ignored(spec):
            config = config_class(task_type=TaskType.CAUSAL_LM, **known_options)
    except InvalidSpecError:
        raise
    except Exception as error:
        raise InvalidSpecError(
            f"PEFT rejects the {spec.peft_type} adapter: {error}",
            found=dict(spec.options),
            do="correct the options",
        ) from error
    if config.is_prompt_learning:
        raise InvalidSpecError(
            f"{spec.peft_type} is not supported: evaluation cannot decode after virtual tokens",
            expected="an adapter inside the layers, such as LORA",
            found=spec.peft_type,
        )
    return config


def to_spec(config: PeftConfig) -> AdapterSpec:
    """Return the spec of a PEFT config: the method, and the options that differ from the defaults.

    Sets become sorted lists, so that equal configs give equal specs. `to_config` is the inverse.
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
            options[field.name] = json_value(value)
    peft_type = config.peft_type
    return AdapterSpec(str(getattr(peft_type, "value", peft_type)), options)


def attach(model: nn.Module, spec: AdapterSpec) -> PeftModel:
    """Attach a new adapter, named "default", to a model and return the PEFT model.

    torch's global generator draws the initial weights. InvalidSpecError, and an unchanged model,
    if the model already has an adapter, an entry of an option matches nothing, PEFT would ignore
    or change an option, the adapter would train weights of the base, or PEFT cannot build it.
    """
    config = to_config(spec)
    if isinstance(model, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise InvalidSpecError(
            "the model already has an adapter",
            expected="a base without an adapter",
            do="load the base again, or remove the adapter with unload()",
        )
    subject = f"the {spec.peft_type} adapter"
    check_options(spec.options, [*names_of(model)], subject)
    _refuse(_unmatched(model, spec), model, "options that match nothing in the model")
    snapshot = ModelSnapshot(model)
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    limit = max(_MIN_ELEMENT_LIMIT, sum(parameter.numel() for parameter in model.parameters()))
    modules = {name: module for name, module in model.named_modules() if name}
    try:
        with BoundedAllocation(limit, subject), _raising_ignored(spec):
            peft_model = get_peft_model(model, config)
        problems = _unused(peft_model, spec) + _unused_exclusions(peft_model, spec, modules)
        _refuse(problems, model, "options that have no effect")
        trained = [own[id(p)] for p in peft_model.parameters() if p.requires_grad and id(p) in own]
        if trained:
            raise InvalidSpecError(
                f"{subject} would train weights of the base: {listed(trained)}",
                expected="an adapter that leaves the base unchanged",
                do="use an adapter that has its own weights, such as modules_to_save",
            )
        if not any(parameter.requires_grad for parameter in peft_model.parameters()):
            raise InvalidSpecError(
                f"{subject} has nothing to train",
                found=dict(spec.options),
                do="select at least one module",
            )
        return peft_model
    except BaseException as error:
        snapshot.restore()
        if not isinstance(error, Exception) or isinstance(error, _PASSED_ON):
            raise
        raise InvalidSpecError(
            f"PEFT cannot attach the {spec.peft_type} adapter to {type(model).__name__}: {error}",
            found=dict(spec.options),
            do="correct the options",
        ) from error


def _unmatched(model: nn.Module, spec: AdapterSpec) -> list[str]:
    """Return a problem for each entry that matches no module, or no module with weights."""
    named = dict(model.named_modules(remove_duplicate=False))
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    rows = 0 if embedding is None else embedding.weight.shape[0]
    problems = unmatched_entries(spec.options, list(named), parameters, rows)
    weighted = [name for name, module in named.items() if any(True for _ in module.parameters())]
    return problems or weightless_entries(spec.options, weighted)


def _unused(peft_model: PeftModel, spec: AdapterSpec) -> list[str]:
    """Return a problem for each option that PEFT did not use, or used with another value."""
    tuner = peft_model.base_model
    names = ("targeted_module_names", "targeted_parameter_names")
    targeted = [target for name in names for target in vars(tuner).get(name, ())]
    problems = unused_entries(spec.options, targeted, spec.peft_type) if targeted else []
    config = peft_model.peft_config["default"]
    for name, value in spec.options.items():
        found = getattr(config, name, value)
        plain = isinstance(value, bool | int | float | str) and name != "target_modules"
        if plain and found != value:
            problems.append(f"{name}: PEFT changed {value!r} to {found!r}")
    return problems + unused_on_model(peft_model, spec.peft_type, spec.options)


def _unused_exclusions(
    peft_model: PeftModel, spec: AdapterSpec, modules: Mapping[str, nn.Module]
) -> list[str]:
    """Return a problem for each entry of exclude_modules that excludes none of the targets."""
    targets = spec.options.get("target_modules")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        linear = [name for name, module in modules.items() if isinstance(module, _LINEAR)]
        return unused_exclusions(spec.options, linear)
    if not targets:
        targets = getattr(peft_model.peft_config["default"], "target_modules", None)
    return unused_exclusions(spec.options, matching_names(targets, modules))


def _refuse(problems: list[str], model: nn.Module, what: str) -> None:
    if problems:
        raise InvalidSpecError(
            f"the adapter has {what}: {'; '.join(problems)}",
            expected=f"entries that match in {type(model).__name__}, which has "
            + ", ".join(_names(model)),
            do="correct or remove these entries",
        )


@contextmanager
def _raising_ignored(spec: AdapterSpec) -> Iterator[None]:
    """Raise InvalidSpecError where PEFT warns about an option that the spec sets.

    PEFT warns where it ignores an option or changes it. Other warnings pass.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    caught = [w for w in caught if not any(t in str(w.message) for t in _HARMLESS_WARNINGS)]
    about = [
        text
        for text in dict.fromkeys(str(warning.message) for warning in caught)
        if any(
            value not in (None, False) and re.search(rf"\b{re.escape(name)}\b", text)
            for name, value in spec.options.items()
        )
    ]
    if about:
        raise InvalidSpecError(
            f"PEFT would ignore or change an option: {' '.join(about)}",
            found=dict(spec.options),
            do="remove this option, or set the option that it depends on",
        )
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _names(model: nn.Module) -> list[str]:
    """Return the last part of the names of the modules with weights, each once, in model order."""
    held = (
        name for name, module in model.named_modules() if any(True for _ in module.parameters())
    )
    last = (name.rpartition(".")[2] for name in held)
    return list(dict.fromkeys(name for name in last if name and not name.isdigit()))
