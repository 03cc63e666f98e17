"""Specs that PEFT ignores, changes or rejects late are refused by name."""

import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from transformers import GPT2Config, GPT2LMHeadModel

from tests.tiny import tiny_model
from trans_peft.checksums import model_checksums
from trans_peft.domain.adapter import AdapterSpec
from trans_peft.errors import InvalidSpecError
from trans_peft.methods.matching import unmatched_entries, unused_entries
from trans_peft.methods.specs import attach

QV = {"target_modules": ["q_proj", "v_proj"]}
IGNORED = {
    "rank_pattern, misspelt": ("LORA", {"rank_pattern": {"q_porj": 16}}, "rank_pattern.*q_porj"),
    "alpha_pattern, misspelt": ("LORA", {"alpha_pattern": {"q_porj": 1}}, "alpha_pattern.*q_porj"),
    "one of two": ("LORA", {"rank_pattern": {"q_proj": 2, "x": 3}}, "rank_pattern.*'?x"),
    "not a target": ("LORA", {"rank_pattern": {"k_proj": 16}}, "rank_pattern.*k_proj"),
    "another layer": ("LORA", {"rank_pattern": {"layers.7.self_attn.q_proj": 2}}, "layers.7"),
    "shadowed": ("LORA", {"rank_pattern": {".*_proj": 2, "q_proj": 4}}, "'q_proj' is never used"),
    "lambda_pattern": ("DELORA", {"lambda_pattern": {"q_porj": 3}}, "lambda_pattern.*q_porj"),
    "block sizes": ("C3A", {"block_size": 8, "block_size_pattern": {"q_porj": 4}}, "q_porj"),
    "frequencies": ("FOURIERFT", {"n_frequency": 9, "n_frequency_pattern": {"q_": 4}}, "'q_'"),
    "ranks of OSF": ("OSF", {"rank_pattern": {"q_porj": 4}}, "q_porj"),
    "a target of two": ("LORA", {"target_modules": ["q_proj", "vproj"]}, "'vproj'"),
    "an empty target": ("LORA", {"target_modules": ["q_proj", ""]}, "''"),
    "an expression": ("LORA", {"target_modules": r"layers\..*"}, "matches no module"),
    "excluded entirely": (
        "LORA",
        {"exclude_modules": r".*v_proj"},
        "'v_proj' matches only modules that exclude_modules",
    ),
    "exclude_modules": ("LORA", {"exclude_modules": ["q_porj"]}, "exclude_modules.*q_porj"),
    "modules_to_save": ("LORA", {"modules_to_save": ["score"]}, "modules_to_save.*score"),
    "saved, as a string": ("LORA", {"modules_to_save": "norm"}, "modules_to_save must be"),
    "feedforward_modules": (
        "IA3",
        {"target_modules": ["down_proj"], "feedforward_modules": ["dwn_proj"]},
        "feedforward_modules",
    ),
    "target_parameters": ("LORA", {"target_parameters": ["gate_up"]}, "target_parameters.*gate_up"),
    "a layer": ("LORA", {"layers_to_transform": [0, 2]}, "no targeted module is in layer 2"),
    "one layer": ("LORA", {"layers_to_transform": 5}, "layers_to_transform.*5"),
    "a negative layer": ("LORA", {"layers_to_transform": [-1]}, "must not be negative"),
    "no layer": ("LORA", {"layers_to_transform": []}, "empty"),
    "layers of an expression": (
        "OFT",
        {"target_modules": r".*q_proj", "layers_to_transform": [0]},
        "no effect where target_modules is a string",
    ),
    "layers_pattern": (
        "LORA",
        {"layers_to_transform": [0], "layers_pattern": ["layers", "h"]},
        "layers_pattern: 'h'",
    ),
    "layers_pattern alone": ("LORA", {"layers_pattern": "layers"}, "layers_to_transform"),
    "a token": ("LORA", {"trainable_token_indices": [3, 258]}, "index 258.*258"),
    "a negative token": ("LORA", {"trainable_token_indices": {"embed_tokens": [-1]}}, "index -1"),
    "tokens of no module": ("LORA", {"trainable_token_indices": {"wte": [1]}}, "'wte'"),
    "tokens twice": ("LORA", {"trainable_token_indices": [3, 3]}, "more than once"),
    "a token alone": ("TRAINABLE_TOKENS", {"token_indices": [999]}, "index 999"),
    "another init's settings": ("LORA", {"eva_config": {}}, "eva_config.*ignored"),
    "quantization's settings": ("LORA", {"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
    "QALoRA's settings": ("LORA", {"qalora_group_size": 4}, "no effect without use_qalora"),
    "transposed": ("LORA", {"fan_in_fan_out": True}, "fan_in_fan_out"),
    "tying nothing": ("LORA", {"ensure_weight_tying": True}, "ensure_weight_tying"),
    "a dropout": ("LORA", {"lora_dropout": -0.1}, r"lora_dropout must lie in \[0, 1\)"),
    "a dropout of all": ("LOKR", {"rank_dropout": 1.0}, "rank_dropout must lie"),
    "an unknown option": ("LORA", {"rank": 4}, "no option 'rank'"),
    "where it came from": ("LORA", {"revision": "x"}, "no option 'revision'"),
}
WRONG_TYPES = {
    "a string for a number": ("LORA", {"lora_alpha": "16"}, "lora_alpha must be int"),
    "a fraction for a number": ("LORA", {"r": 4.5}, "r must be int"),
    "a boolean for a number": ("LORA", {"r": True}, "r must be int"),
    "nothing for a number": ("LORA", {"r": None}, "r must be int"),
    "not finite": ("LORA", {"lora_dropout": float("nan")}, "lora_dropout: nan is not finite"),
    "a rank as a string": ("LORA", {"rank_pattern": {"q_proj": "8"}}, "positive number, not '8'"),
    "a rank of zero": ("LORA", {"rank_pattern": {"q_proj": 0}}, "positive number, not 0"),
    "a half rank": ("LOHA", {"rank_pattern": {"q_proj": 1.5}}, "positive number, not 1.5"),
    "an alpha that is not finite": (
        "LORA",
        {"alpha_pattern": {"q_proj": float("inf")}},
        "alpha_pattern.q_proj: inf is not finite",
    ),
    "a list for a mapping": ("LORA", {"rank_pattern": ["q_proj"]}, "rank_pattern must be"),
    "numbers for names": ("LORA", {"target_modules": [1]}, "target_modules must be"),
    "a mapping for names": ("LORA", {"target_modules": {"q_proj": 1}}, "target_modules must be"),
    "a word": ("OFT", {"bias": "some"}, "bias must be"),
    "an initialization": ("LORA", {"init_lora_weights": "best"}, "init_lora_weights must be"),
    "a layer as a string": ("LORA", {"layers_to_transform": ["0"]}, "layers_to_transform must be"),
    "an expression that is none": ("LORA", {"target_modules": "(q_proj"}, "regular expression"),
    "a rank's expression": ("LORA", {"rank_pattern": {"*q": 4}}, r"rank_pattern: '\*q' is not a"),
    "an excluded expression": ("LORA", {"exclude_modules": "["}, "regular expression"),
    "a saved expression": ("LORA", {"modules_to_save": ["(("]}, "modules_to_save.*regular expr"),
    "a layer's expression": (
        "LORA",
        {"layers_to_transform": [0], "layers_pattern": "(?P<"},
        "layers_pattern.*regular expression",
    ),
}
UNSUPPORTED = {
    "biases of the base": ("LORA", {"bias": "all"}, "biases of the base"),
    "biases of another method": ("BOFT", {"bias": "boft_only"}, "biases of the base"),
    "PiSSA": ("LORA", {"init_lora_weights": "pissa"}, "rewrites the weights of the base"),
    "EVA": ("LORA", {"init_lora_weights": "eva"}, "statistics"),
    "KaSA": ("LORA", {"kasa_config": {}}, "rewrites the weights of the base"),
    "replicated layers": ("LORA", {"layer_replication": [[0, 2], [0, 2]]}, "do not exist"),
    "aLoRA": ("LORA", {"alora_invocation_tokens": [1]}, "batched evaluation"),
    "Arrow": ("LORA", {"arrow_config": {}}, "other adapters"),
    "ranks by a schedule": ("ADALORA", {"total_step": 9}, "after each step"),
    "shapes of the base": ("ADAMSS", {}, "no other base fits"),
    "virtual tokens": ("PROMPT_TUNING", {"num_virtual_tokens": 3}, "virtual tokens"),
    "adapters from paths": ("XLORA", {"hidden_size": 32, "adapters": {}}, "paths"),
    "routing over a batch": ("LILY", {}, "depends on the batch"),
}
REFUSED = IGNORED | WRONG_TYPES | UNSUPPORTED


def spec_of(peft_type, options):
    untargeted = ("TRAINABLE_TOKENS", "PROMPT_TUNING", "XLORA")
    return AdapterSpec(peft_type, ({} if peft_type in untargeted else QV) | options)


@pytest.mark.parametrize("case", REFUSED)
def test_an_option_that_peft_ignores_or_rejects_late_is_refused(case):
    peft_type, options, message = REFUSED[case]
    model = tiny_model()
    before = model_checksums(model)
    with pytest.raises(InvalidSpecError, match=f"(?s){message}"):
        attach(model, spec_of(peft_type, options))
    assert not before.changes(model_checksums(model))


ACCEPTED = {
    "patterns": ("LORA", {"rank_pattern": {"layers.1.*q_proj": 8, "q_proj": 2}}),
    "a pattern for each layer": (
        "LORA",
        {"alpha_pattern": {r"layers\.[01]\.self_attn\.q_proj": 2}},
    ),
    "layers": ("LORA", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "a layer": ("LORA", {"layers_to_transform": 1}),
    "all linear": ("LORA", {"target_modules": "all-linear", "exclude_modules": ["lm_head"]}),
    "biases of its own": ("LORA", {"lora_bias": True}),
    "a whole module": ("LORA", {"modules_to_save": ["norm"]}),
    "a module's own name": ("LORA", {"target_modules": ["model.layers.0.mlp.up_proj"]}),
    "embeddings": ("LORA", {"target_modules": ["embed_tokens"]}),
    "tied": ("LORA", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "tokens": ("LORA", {"trainable_token_indices": {"embed_tokens": [0, 257]}}),
    "frequencies": ("FOURIERFT", {"n_frequency": 9, "n_frequency_pattern": {"q_proj": 4}}),
    "values that are the defaults": (
        "LORA",
        {"rank_pattern": {}, "bias": "none", "use_dora": False},
    ),
    "targets that PEFT knows": ("LORA", {"target_modules": None}),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_an_option_that_matches_is_accepted(case):
    peft_type, options = ACCEPTED[case]
    model = attach(tiny_model(), spec_of(peft_type, options))
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_a_rank_pattern_gives_the_rank_that_it_names():
    spec = AdapterSpec("LORA", QV | {"r": 4, "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 16}})
    model = attach(tiny_model(), spec)
    ranks = {
        name.removeprefix("base_model.model.model.").removesuffix(".lora_A.default.weight"): len(p)
        for name, p in model.named_parameters()
        if "lora_A" in name
    }
    assert ranks == {
        "layers.0.self_attn.q_proj": 4,
        "layers.0.self_attn.v_proj": 4,
        "layers.1.self_attn.q_proj": 16,
        "layers.1.self_attn.v_proj": 4,
    }


def test_a_default_that_peft_adjusts_to_the_model_is_accepted():
    """GPT-2's layers are transposed; PEFT warns about it."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach(model, AdapterSpec("LORA", {"target_modules": ["c_attn"]}))
    assert any("fan_in_fan_out" in str(warning.message) for warning in caught)


MODULES = [name for name, _ in tiny_model().named_modules()]
PARAMETERS = [name for name, _ in tiny_model().named_parameters()]


@given(st.sampled_from(MODULES[1:]), st.data())
@settings(max_examples=100, deadline=None)
def test_an_end_of_a_name_matches_and_a_changed_end_does_not(name, data):
    parts = name.split(".")
    end = ".".join(parts[data.draw(st.integers(0, len(parts) - 1)) :])
    assert not unmatched_entries({"target_modules": [end]}, MODULES, PARAMETERS, 4)
    broken = end + data.draw(st.sampled_from("xyz~"))
    assert unmatched_entries({"target_modules": [end, broken]}, MODULES, PARAMETERS, 4) == [
        f"target_modules: {broken!r} matches no module"
    ]


@given(
    st.dictionaries(
        st.sampled_from(
            ["q_proj", "v_proj", r"layers\.0\..*", r"layers\.[1-9]\..*", "k_proj", ".*"]
        ),
        st.integers(1, 9),
        min_size=1,
    )
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_key_of_a_pattern_is_unused_if_no_rank_depends_on_it(pattern):
    targeted = [name for name in MODULES if name.endswith(("q_proj", "v_proj"))]
    unused = unused_entries(QV | {"rank_pattern": pattern}, targeted, "LORA")
    used = {get_pattern_key(pattern.keys(), name) for name in targeted}
    assert len(unused) == len(set(pattern) - used)
