"""Convert config.json of InternLM2 to that of Llama.

InternLM2 (arXiv:2403.17297) computes the same function as transformers' Llama. The meaning of each
field follows configuration_internlm2.py and modeling_internlm2.py of the release, which were read
and are never run. A field without an equivalent in Llama is refused, and so is a missing field
for which the release's code has a default.
"""

from collections.abc import Mapping
from typing import Any

from trans_peft.bases.model_files import OUTPUT_NEUTRAL_FIELDS
from trans_peft.domain.numbers import is_finite_number

__all__ = [
    "ARCHITECTURE",
    "config_problems",
    "is_internlm2",
    "llama_config",
]

ARCHITECTURE = "InternLM2ForCausalLM"

_COUNTS = (
    "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "vocab_size",
)  # fmt: skip
_NUMBERS = ("rms_norm_eps", "rope_theta")
_FLAGS = ("bias", "tie_word_embeddings")
_REQUIRED = (*_COUNTS, *_NUMBERS, *_FLAGS, "hidden_act")
_COPIED = frozenset({
    "bos_token_id", "dtype", "eos_token_id", "initializer_range", "pad_token_id", "torch_dtype",
    "use_cache",
})  # fmt: skip
"""Fields with the same meaning in both layouts, and the same default if outputs depend on it."""
_REPLACED = frozenset({"architectures", "attn_implementation", "auto_map", "model_type"})
_CHECKED = frozenset({"pretraining_tp", "rope_scaling"})


def is_internlm2(config: Mapping[str, Any]) -> bool:
    """Whether config.json declares InternLM2's layout."""
    return config.get("model_type") == "internlm2"


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """Return all reasons why a config.json has no equivalent for Llama."""
    problems = []
    if config.get("architectures") != [ARCHITECTURE]:
        found = config.get("architectures")
        problems.append(f"`architectures` must be [{ARCHITECTURE!r}], not {found!r}")
    if missing := sorted(set(_REQUIRED) - config.keys()):
        problems.append(
            f"missing fields: {', '.join(missing)}; defaults of the release's code are not used"
        )
    known = {*_REQUIRED, *_COPIED, *_REPLACED, *_CHECKED, *OUTPUT_NEUTRAL_FIELDS}
    if unknown := sorted(config.keys() - known):
        problems.append(f"fields without an equivalent in Llama: {', '.join(unknown)}")
    for kind, names, fits in (
        ("a positive integer", _COUNTS, lambda v: type(v) is int and v > 0),
        ("a positive number", _NUMBERS, lambda v: is_finite_number(v) and v > 0),
        ("true or false", _FLAGS, lambda v: isinstance(v, bool)),
        ("a string", ("hidden_act",), lambda v: isinstance(v, str)),
    ):
        problems += [
            f"`{name}` must be {kind}, not {config[name]!r}"
            for name in names
            if name in config and not fits(config[name])
        ]
    if config.get("pretraining_tp", 1) != 1:
        problems.append("`pretraining_tp` must be 1: larger values drop the biases")
    problems += _scaling_problems(config.get("rope_scaling"))
    if not problems:
        hidden, heads, kv_heads = (
            config[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")
        )
        if hidden % heads or hidden // heads % 2:
            problems.append(
                f"hidden_size {hidden} and {heads} attention heads give no even head size"
            )
        if heads % kv_heads:
            problems.append(
                f"{heads} attention heads are not a multiple of {kv_heads} key/value heads"
            )
    return [f"config.json: {problem}" for problem in problems]


def llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the LlamaForCausalLM config for a config without `config_problems`."""
    scaling = config.get("rope_scaling")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{name: config[name] for name in config if name in _COPIED},
        **{name: config[name] for name in _REQUIRED if name != "bias"},
        "attention_bias": config["bias"],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "mlp_bias": False,
        "rope_scaling": scaling
        and {"rope_type": scaling["type"], "factor": float(scaling["factor"])},
    }


def _scaling_problems(scaling: Any) -> list[str]:
    match scaling:
        case None:
            return []
        case {"type": "dynamic" | "linear", "factor": factor, **more} if (
            not more and is_finite_number(factor) and factor >= 1
        ):
            return []
        case _:
            expected = '{"type": "dynamic" or "linear", "factor": at least 1}'
            return [f"`rope_scaling` must be null or {expected}, not {scaling!r}"]
