"""Checks of an adapter's options that need no model: types, ranges, and what PEFT ignores.

The tables below result from a comparison, for every option of every method, of an adapter with the
option and one without it: initial weights, losses, logits and saved files
(`tests/methods/test_every_option.py` repeats the comparison). They describe PEFT 0.21.
"""

import dataclasses
import json
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from peft import PeftConfig
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from trans_peft.domain.numbers import is_finite_number

__all__ = ["not_evaluable", "not_trainable", "option_problems", "saved_problems"]

_NOT_EVALUABLE: Mapping[str, str] = {
    "LILY": "its routing averages over a whole batch, so an answer depends on the batch",
    "MULTITASK_PROMPT_TUNING": "it needs a task id with every row",
    "POLY": "it needs a task id with every row",
    "SHADOW": "it has a second model, whose cache the evaluation does not keep",
    "XLORA": "it loads other adapters from paths in its configuration",
    "alora_invocation_tokens": "batched evaluation does not track where the adapter is active",
    "arrow_config": "it routes between other adapters, which its folder does not contain",
    "kasa_config": "it rewrites the weights of the base",
    "layer_replication": "the replicated layers do not exist in the base",
    "megatron_config": "the model does not run in Megatron",
    "sample_at_inference": "it draws random numbers at inference, so evaluations are not "
    "reproducible",
}
"""Methods and options that rule out an evaluation, with the reason."""

_NOT_TRAINABLE: Mapping[str, str] = {
    "ADAMSS": "the shapes of its weights depend on the base's weights, so no other base fits",
    "ADALORA": "its ranks change by a call after each step, which training does not make",
    "lora_ga_config": "it configures the initialization lora_ga, which is not supported",
    "monteclora_config": "its loss term is not part of the training loss",
    "save_only_topk_weights": "PEFT cannot load the saved file again, neither for an evaluation "
    "nor from a checkpoint",
    "use_asa": "its budget changes by a call after each step, which training does not make",
    "use_qalora": "PEFT applies it to GPTQ layers only, and no base is loaded in GPTQ",
}
"""Methods and options that rule out training, with the reason."""

_INITS = {
    "corda": "it needs statistics of the data, collected before training",
    "eva": "it needs statistics of the data, collected before training; PEFT starts like LoRA",
    "loftq": "it rewrites the weights of the base",
    "lora_ga": "it needs gradients, collected before training, and rewrites the base",
    "olora": "it rewrites the weights of the base",
    "pissa": "it rewrites the weights of the base",
}
"""Values of `init_lora_weights` that are not supported, with the reason."""

_IGNORED: Mapping[tuple[str, str], str] = {
    ("HIRA", "rank_pattern"): "PEFT uses r for every module",
    ("LOHA", "use_effective_conv2d"): "it changes convolutions only, and no target is one",
    ("LOKR", "use_effective_conv2d"): "it changes convolutions only, and no target is one",
    ("OFT", "module_dropout"): "PEFT creates the dropout and does not apply it",
    ("OSF", "target_svd_config"): "PEFT accepts it and does not read it",
    ("PSOFT", "psoft_alpha"): "PEFT divides the initial weights by it and multiplies the output "
    "by it, which cancels",
}
"""Options that PEFT accepts and that change nothing, with the reason."""


@dataclasses.dataclass(frozen=True)
class _Need:
    """The condition on other options under which PEFT reads an option."""

    text: str
    is_met: Callable[[Mapping[str, Any]], bool]


def _set(option: str) -> _Need:
    return _Need(f"without {option}", lambda options: bool(options.get(option)))


def _equal(option: str, value: Any) -> _Need:
    return _Need(f"unless {option} is {value!r}", lambda options: options.get(option) == value)


def _unset(option: str) -> _Need:
    return _Need(f"where {option} is set", lambda options: not options.get(option))


_NEEDS: Mapping[tuple[str, str], tuple[_Need, ...]] = {
    ("*", "qalora_group_size"): (_set("use_qalora"),),
    ("*", "megatron_core"): (_set("megatron_config"),),
    ("*", "rank_dropout_scale"): (_set("rank_dropout"),),
    ("BOTTLENECK", "compensation_rank"): (_set("compensated_modules"),),
    ("DEFT", "alpha"): (_unset("para"),),
    ("DEFT", "init_scale"): (_equal("init_weights", False), _unset("para")),
    ("DEFT", "init_weights"): (_unset("para"),),
    ("MISS", "mini_r"): (_equal("init_weights", "mini"),),
    ("OFT", "eps"): (_set("coft"),),
    ("OFT", "num_cayley_neumann_terms"): (
        _Need(
            "where use_cayley_neumann is False", lambda o: o.get("use_cayley_neumann") is not False
        ),
    ),
    ("PSOFT", "cayley_neumann_eps"): (_set("use_cayley_neumann"),),
    ("PSOFT", "num_cayley_neumann_terms"): (_set("use_cayley_neumann"),),
    ("PSOFT", "psoft_svd_lowrank_niter"): (_equal("psoft_svd", "lowrank"),),
    ("PSOFT", "random_seed"): (_equal("psoft_svd", "lowrank"),),
    ("PSOFT", "use_cayley_neumann"): (
        _Need("where psoft_orth is False", lambda o: o.get("psoft_orth") is not False),
    ),
    ("RANDLORA", "sparse"): (_unset("very_sparse"),),
    ("SUPERTUNING", "lora_alpha"): (_set("r"),),
    ("SUPERTUNING", "lora_dropout"): (_set("r"),),
    ("TINYLORA", "init_v_bound"): (
        _Need(
            "unless init_weights is 'uniform' or False",
            lambda o: o.get("init_weights") in ("uniform", False),
        ),
    ),
    ("WAVEFT", "n_frequency_pattern"): (_unset("proportional_parameters"),),
    ("WAVEFT", "wavelet_family"): (
        _Need("where use_idwt is False", lambda o: o.get("use_idwt") is not False),
    ),
}
"""Options that PEFT reads only together with others, by method ("*": any) and option."""

_POSITIVE = frozenset({
    "adapter_layers", "adapter_len", "alpha", "block_size", "bottleneck_dim", "compensation_rank",
    "d_initial",
    "delora_lambda", "eps", "gralora_k", "group_size", "init_logits_std", "init_scale",
    "init_theta_d_bound", "init_v_bound", "init_vector_bank_bound", "lora_alpha", "mini_r",
    "n_frequency", "num_cayley_neumann_terms", "num_vectors", "psoft_svd_lowrank_niter",
    "qalora_group_size", "r", "randlora_alpha", "scaling", "subspace_rank", "theta_d_length",
    "topk", "u", "vector_length",
})  # fmt: skip
"""Numbers that must be above 0: at 0 the adapter has no effect, below 0 no meaning."""

_NOT_NEGATIVE = frozenset({
    "boft_block_num", "boft_block_size", "boft_n_butterfly_factor", "depth", "hybrid_r",
    "oft_block_size", "proj_seed", "projection_prng_key", "projection_seed", "random_loc_seed",
    "random_seed", "generator_seed", "regularization_alpha",
})  # fmt: skip
_FRACTIONS = frozenset({"sparse_rate", "sparsity", "weight_tying"})
"""Numbers that must lie in [0, 1]."""


def not_evaluable(peft_type: str, options: Mapping[str, Any]) -> list[str]:
    """Return the reasons why a saved adapter cannot be evaluated on a base."""
    return _listed_in(_NOT_EVALUABLE, peft_type, options)


def not_trainable(peft_type: str, options: Mapping[str, Any]) -> list[str]:
    """Return the reasons why an adapter cannot be trained, saved and evaluated."""
    problems = _listed_in({**_NOT_EVALUABLE, **_NOT_TRAINABLE}, peft_type, options)
    init = str(options.get("init_lora_weights", "")).lower()
    problems += [
        f"init_lora_weights={init!r} is not supported: {reason}"
        for name, reason in _INITS.items()
        if init == name or init.startswith(f"{name}_niter")
    ]
    if options.get("bias", "none") != "none":
        problems.append(
            f"bias={options['bias']!r} is not supported: it trains biases of the base, which all "
            "adapters share; lora_bias=True gives the adapter its own biases"
        )
    return problems


def _listed_in(reasons: Mapping[str, str], peft_type: str, options: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is not supported: {reason}"
        for name, reason in reasons.items()
        if name == peft_type or options.get(name) not in (None, False)
    ]


def saved_problems(config_class: type[PeftConfig], options: Mapping[str, Any]) -> list[str]:
    """Return a problem for each field of an adapter_config.json whose type differs from PEFT's.

    More is allowed than in a spec, because PEFT wrote the file: a fraction where PEFT declares a
    whole number, and a literal of another version.
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


def option_problems(
    config_class: type[PeftConfig], peft_type: str, options: Mapping[str, Any]
) -> list[str]:
    """Return a problem for each option with a wrong type, out of range, or without effect.

    `options` are JSON values. PEFT itself checks few types and ranges: a wrong value fails late or
    changes the adapter.
    """
    types = typing.get_type_hints(config_class)
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    problems = []
    for name, value in options.items():
        if name not in types:
            continue
        wrong = _wrong_type(types[name], value)
        if wrong is not None:
            problems.append(f"{name} must be {_named(types[name])}, not {value!r}{wrong}")
            continue
        is_default = name in defaults and value == defaults[name]
        problems += [] if is_default else _range_problems(name, value, types[name])
        if not is_default and value not in (None, [], {}):
            problems += _effect_problems(peft_type, name, options)
    return problems


def _effect_problems(peft_type: str, name: str, options: Mapping[str, Any]) -> list[str]:
    """Return why PEFT would ignore an option that differs from its default."""
    if reason := _IGNORED.get((peft_type, name)):
        return [f"{name} has no effect in {peft_type}: {reason}"]
    needs = _NEEDS.get((peft_type, name), _NEEDS.get(("*", name), ()))
    return [f"{name} has no effect {need.text}" for need in needs if not need.is_met(options)]


def _range_problems(name: str, value: Any, kind: Any) -> Iterator[str]:
    """Yield a problem for a value of the right type that is outside the option's range."""
    is_number = isinstance(value, float | int) and not isinstance(value, bool)
    if is_number and "dropout" in name and not 0 <= value < 1:
        yield f"{name} must lie in [0, 1), not {value!r}"
    elif is_number and name in _POSITIVE and value <= 0:
        yield f"{name} must be positive, not {value!r}"
    elif is_number and name in _NOT_NEGATIVE and value < 0:
        yield f"{name} must not be negative, not {value!r}"
    elif is_number and name in _FRACTIONS and not 0 <= value <= 1:
        yield f"{name} must lie in [0, 1], not {value!r}"
    elif is_number and name == "decompose_factor" and value < 1 and value != -1:
        yield f"{name} must be positive, or -1 for the square root of the size, not {value!r}"
    elif name.endswith("_pattern") and isinstance(value, Mapping):
        whole = not name.startswith(("alpha", "lambda")) and "float" not in str(kind)
        for key, item in value.items():
            if not _positive(item, whole=whole):
                yield f"{name}: {key!r} must have a positive number, not {item!r}"
    elif name in ("layers_to_transform", "token_indices") and _any_negative(value):
        yield f"{name} must not be negative: {value!r}"
    if name in ("token_indices", "trainable_token_indices") and value is not None:
        yield from _token_problems(name, value)


def _token_problems(name: str, value: Any) -> Iterator[str]:
    """Yield a problem for each list of token indices that is empty or has a repeated index."""
    lists = value if isinstance(value, Mapping) else {"": value}
    if not lists:
        yield f"{name} must name at least one module"
    for module, indices in lists.items():
        where = f"{name}[{module!r}]" if module else name
        if not indices:
            yield f"{where} must have at least one token index, found none"
        elif len(set(indices)) < len(indices):
            yield f"{where}: token indices are given more than once"


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


def _positive(value: Any, *, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return is_finite_number(value) and value > 0


def _any_negative(value: Any) -> bool:
    return any(index < 0 for index in ([value] if isinstance(value, int) else value or ()))
