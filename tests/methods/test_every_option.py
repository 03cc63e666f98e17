"""Every option of every method changes the adapter, or is refused: none is accepted and ignored."""

import dataclasses
from functools import cache

import pytest
import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file

from tests.tiny import tiny_model
from tests.training.test_adapter_check import METHODS, QV
from trans_peft.domain.spec import AdapterSpec
from trans_peft.errors import InvalidSpecError
from trans_peft.methods.registration import register_methods
from trans_peft.methods.specs import attach
from trans_peft.training.adapter_check import save_adapter

register_methods()
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
BASES = {"LORA": {**QV, "r": 4}, **METHODS}
COMMON = {field.name for field in dataclasses.fields(PeftConfig)} | {
    "bias", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform",
    "modules_to_save", "runtime_config", "target_modules", "target_parameters",
    "trainable_token_indices",
}  # fmt: skip
"""Options that select modules; tests/methods/test_options.py covers them."""

EFFECTS = {
    "LORA": {
        "r": (8, {}),
        "lora_alpha": (16, {}),
        "lora_dropout": (0.5, {}),
        "use_rslora": (True, {}),
        "init_lora_weights": ("gaussian", {}),
        "rank_pattern": ({"q_proj": 2}, {}),
        "alpha_pattern": ({"q_proj": 2}, {}),
        "use_dora": (True, {}),
        "lora_bias": (True, {}),
        "velora_config": ({"num_groups": 8, "scale": 0.5}, {}),
        "use_bdlora": ({"target_modules_bd_a": ["q_proj", "v_proj"], "nblocks": 2}, {}),
    },
    "ADAPTION_PROMPT": {
        "adapter_len": (3, {}),
        "adapter_layers": (2, {}),
    },
    "BEFT": {
        "init_weights": (False, {}),
    },
    "BOFT": {
        "boft_block_size": (8, {}),
        "boft_dropout": (0.5, {}),
        "init_weights": (False, {}),
        "boft_block_num": (4, {"boft_block_size": 0}),
    },
    "BOTTLENECK": {
        "bottleneck_dim": (8, {}),
        "non_linearity": ("gelu", {}),
        "init_bottleneck_weights": (False, {}),
        "compensated_modules": (["model.layers.0.mlp.up_proj"], {}),
        "compensation_rank": (4, {"compensated_modules": ("model.layers.0.mlp.up_proj",)}),
    },
    "C3A": {
        "block_size": (16, {}),
        "block_size_pattern": ({"q_proj": 2}, {}),
        "init_weights": ("gaussian", {}),
    },
    "DEFT": {
        "r": (16, {}),
        "decomposition_method": ("qr", {}),
        "alpha": (3, {}),
        "para": (True, {}),
        "deft_dropout": (0.5, {}),
        "init_weights": (False, {}),
        "init_scale": (3.0, {"init_weights": False}),
    },
    "DELORA": {
        "r": (16, {}),
        "delora_lambda": (30, {}),
        "module_dropout": (0.5, {}),
        "init_weights": (False, {}),
        "rank_pattern": ({"q_proj": 2}, {}),
        "lambda_pattern": ({"q_proj": 3}, {}),
    },
    "FOURIERFT": {
        "n_frequency": (40, {}),
        "scaling": (300.0, {}),
        "random_loc_seed": (1554, {}),
        "n_frequency_pattern": ({"q_proj": 2}, {}),
        "init_weights": (True, {}),
    },
    "FROD": {
        "projection_prng_key": (1, {}),
        "save_projection": (False, {}),
        "frod_dropout": (0.5, {}),
        "init_weights": (False, {}),
        "sparse_rate": (0.02, {}),
        "regularization_alpha": (0.002, {}),
    },
    "GLORA": {
        "r": (16, {}),
        "config_A_B": ("vector", {}),
        "init_weights": (False, {}),
    },
    "GRALORA": {
        "r": (16, {}),
        "hybrid_r": (1, {}),
        "alpha": (128, {}),
        "gralora_dropout": (0.5, {}),
        "gralora_k": (4, {}),
        "init_weights": (False, {}),
    },
    "HIRA": {
        "r": (64, {}),
        "hira_dropout": (0.5, {}),
        "init_weights": (False, {}),
    },
    "HRA": {
        "r": (16, {}),
        "apply_GS": (True, {}),
        "init_weights": (False, {}),
    },
    "IA3": {
        "feedforward_modules": ([], {}),
        "init_ia3_weights": (False, {}),
    },
    "LOHA": {
        "rank_pattern": ({"q_proj": 2}, {}),
        "alpha_pattern": ({"q_proj": 2}, {}),
        "r": (16, {}),
        "alpha": (16, {}),
        "rank_dropout": (0.5, {}),
        "init_weights": (False, {}),
        "module_dropout": (0.5, {}),
    },
    "LOKR": {
        "rank_pattern": ({"q_proj": 2}, {}),
        "alpha_pattern": ({"q_proj": 2}, {}),
        "r": (16, {}),
        "alpha": (16, {}),
        "rank_dropout": (0.5, {}),
        "init_weights": (False, {}),
        "module_dropout": (0.5, {}),
        "decompose_both": (True, {"r": 1}),
        "decompose_factor": (2, {}),
        "rank_dropout_scale": (True, {"rank_dropout": 0.5}),
    },
    "MISS": {
        "r": (8, {}),
        "miss_dropout": (0.5, {}),
        "init_weights": (False, {}),
        "mini_r": (2, {"init_weights": "mini"}),
    },
    "OFT": {
        "oft_block_size": (8, {}),
        "init_weights": (False, {}),
        "coft": (True, {}),
        "block_share": (True, {}),
        "use_cayley_neumann": (False, {}),
        "num_cayley_neumann_terms": (2, {}),
        "eps": (0.5, {"coft": True}),
        "r": (4, {"oft_block_size": 0}),
    },
    "OSF": {
        "effective_rank": (4, {}),
        "rank_pattern": ({"q_proj": 2}, {}),
        "init_weights": (False, {}),
    },
    "PEANUT": {
        "r": (64, {}),
        "depth": (1, {}),
        "act_fn": ("gelu", {}),
        "scaling": (2.0, {}),
        "init_weights": (False, {}),
    },
    "PSOFT": {
        "r": (8, {}),
        "psoft_dropout": (0.5, {}),
        "ab_svd_init": ("pissa_init", {}),
        "psoft_svd": ("lowrank", {}),
        "psoft_orth": (False, {}),
        "psoft_mag_b": (False, {}),
        "psoft_mag_a": (False, {}),
        "use_cayley_neumann": (True, {}),
        "init_weights": (False, {}),
        "psoft_svd_lowrank_niter": (1, {"psoft_svd": "lowrank"}),
        "random_seed": (1, {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 1}),
        "num_cayley_neumann_terms": (2, {"use_cayley_neumann": True}),
        "cayley_neumann_eps": (0.01, {"use_cayley_neumann": True}),
    },
    "PVERA": {
        "r": (512, {}),
        "projection_prng_key": (1, {}),
        "save_projection": (False, {}),
        "pvera_dropout": (0.5, {}),
        "d_initial": (0.2, {}),
        "init_weights": (False, {}),
        "generator_seed": (3, {}),
    },
    "RANDLORA": {
        "r": (64, {}),
        "projection_prng_key": (1, {}),
        "save_projection": (False, {}),
        "sparse": (True, {}),
        "very_sparse": (True, {}),
        "randlora_dropout": (0.5, {}),
        "randlora_alpha": (1280, {}),
        "init_weights": (False, {}),
    },
    "ROAD": {
        "variant": ("road_2", {}),
        "group_size": (16, {}),
        "init_weights": (False, {}),
    },
    "SHIRA": {
        "r": (4, {}),
        "random_seed": (3, {}),
        "init_weights": (False, {}),
    },
    "SUPERTUNING": {
        "select_top": (False, {}),
        "r": (4, {}),
        "init_weights": (False, {}),
        "save_precomputed_indices": (False, {}),
        "sparsity": (0.5, {}),
        "lora_alpha": (3, {"r": 4}),
        "lora_dropout": (0.5, {"r": 4}),
    },
    "TINYLORA": {
        "r": (4, {}),
        "u": (128, {}),
        "weight_tying": (0.5, {}),
        "projection_seed": (84, {}),
        "save_projection": (False, {}),
        "tinylora_dropout": (0.5, {}),
        "init_weights": (False, {}),
        "init_v_bound": (0.5, {"init_weights": "uniform"}),
    },
    "TRAINABLE_TOKENS": {
        "init_weights": (False, {}),
        "token_indices": ([3, 5], {}),
    },
    "UNILORA": {
        "r": (8, {}),
        "proj_seed": (84, {}),
        "theta_d_length": (128, {}),
        "unilora_dropout": (0.5, {}),
        "init_theta_d_bound": (0.04, {}),
        "init_weights": (False, {}),
        "save_indices": (True, {}),
    },
    "VBLORA": {
        "r": (8, {}),
        "num_vectors": (16, {}),
        "vector_length": (16, {}),
        "topk": (4, {}),
        "vblora_dropout": (0.5, {}),
        "init_vector_bank_bound": (0.04, {}),
        "init_logits_std": (0.2, {}),
    },
    "VERA": {
        "r": (512, {}),
        "save_projection": (True, {}),
        "vera_dropout": (0.5, {}),
        "d_initial": (0.2, {}),
        "init_weights": (False, {}),
        "projection_prng_key": (1, {}),
    },
    "WAVEFT": {
        "n_frequency": (40, {}),
        "scaling": (50.0, {}),
        "use_idwt": (False, {}),
        "random_loc_seed": (1554, {}),
        "n_frequency_pattern": ({"q_proj": 2}, {}),
        "proportional_parameters": (True, {}),
        "init_weights": (False, {}),
        "wavelet_family": ("db3", {}),
    },
}
"""By method and option: a value that changes the adapter, and the options that it depends on."""

IGNORED = {
    ("BOFT", "boft_dropout"): ({"boft_dropout": 0.1}, "at least 1 / 8, the number of blocks"),
    ("BOTTLENECK", "compensation_rank"): (
        {"compensation_rank": 4},
        "without compensated_modules",
    ),
    ("DEFT", "alpha"): ({"alpha": 3, "para": True}, "no effect where para is set"),
    ("DEFT", "init_scale"): ({"init_scale": 2.0}, "no effect unless init_weights is False"),
    ("DEFT", "init_weights"): ({"init_weights": False, "para": True}, "where para is set"),
    ("GLORA", "config_C"): ({"config_C": "vector"}, "no targeted module has a bias"),
    ("GLORA", "config_D_E"): ({"config_D_E": "vector"}, "no targeted module has a bias"),
    ("GLORA", "r"): ({"config_A_B": "vector", "r": 4}, "r has no effect"),
    ("HIRA", "rank_pattern"): ({"rank_pattern": {"q_proj": 2}}, "PEFT uses r for every module"),
    ("LOHA", "use_effective_conv2d"): ({"use_effective_conv2d": True}, "convolutions only"),
    ("LOKR", "use_effective_conv2d"): ({"use_effective_conv2d": True}, "convolutions only"),
    ("LOKR", "decompose_both"): ({"decompose_both": True}, "decompose_both has no effect"),
    ("LOKR", "rank_dropout_scale"): ({"rank_dropout_scale": True}, "without rank_dropout"),
    ("LORA", "corda_config"): ({"corda_config": {}}, "corda_config.*ignored"),
    ("LORA", "ensure_weight_tying"): ({"ensure_weight_tying": True}, "ensure_weight_tying"),
    ("LORA", "eva_config"): ({"eva_config": {}}, "eva_config.*ignored"),
    ("LORA", "loftq_config"): ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
    ("LORA", "lora_dropout"): (
        {"target_modules": ["embed_tokens"], "lora_dropout": 0.5},
        "no effect on embeddings",
    ),
    ("LORA", "lora_ga_config"): ({"lora_ga_config": {}}, "lora_ga_config is not supported"),
    ("LORA", "megatron_core"): ({"megatron_core": "x"}, "without megatron_config"),
    ("LORA", "qalora_group_size"): ({"qalora_group_size": 4}, "without use_qalora"),
    ("LORA", "use_qalora"): ({"use_qalora": True}, "GPTQ layers only"),
    ("MISS", "mini_r"): ({"mini_r": 2}, "unless init_weights is 'mini'"),
    ("OFT", "eps"): ({"eps": 0.1}, "no effect without coft"),
    ("OFT", "module_dropout"): ({"module_dropout": 0.5}, "does not apply it"),
    ("OFT", "num_cayley_neumann_terms"): (
        {"use_cayley_neumann": False, "num_cayley_neumann_terms": 9},
        "where use_cayley_neumann is False",
    ),
    ("OSF", "target_svd_config"): ({"target_svd_config": {"a": 3}}, "does not read it"),
    ("PSOFT", "cayley_neumann_eps"): ({"cayley_neumann_eps": 0.1}, "without use_cayley_neumann"),
    ("PSOFT", "num_cayley_neumann_terms"): (
        {"num_cayley_neumann_terms": 9},
        "without use_cayley_neumann",
    ),
    ("PSOFT", "psoft_alpha"): ({"psoft_alpha": 64}, "which cancels"),
    ("PSOFT", "psoft_svd_lowrank_niter"): ({"psoft_svd_lowrank_niter": 2}, "'lowrank'"),
    ("PSOFT", "random_seed"): ({"random_seed": 1}, "'lowrank'"),
    ("PSOFT", "use_cayley_neumann"): (
        {"use_cayley_neumann": True, "psoft_orth": False},
        "where psoft_orth is False",
    ),
    ("RANDLORA", "sparse"): ({"sparse": True, "very_sparse": True}, "where very_sparse is set"),
    ("SUPERTUNING", "lora_alpha"): ({"lora_alpha": 4}, "without r"),
    ("SUPERTUNING", "lora_dropout"): ({"lora_dropout": 0.5}, "without r"),
    ("TINYLORA", "init_v_bound"): ({"init_v_bound": 0.5}, "unless init_weights is 'uniform'"),
    ("WAVEFT", "n_frequency_pattern"): (
        {"n_frequency_pattern": {"q_proj": 3}, "proportional_parameters": True},
        "where proportional_parameters is set",
    ),
    ("WAVEFT", "wavelet_family"): (
        {"wavelet_family": "db3", "use_idwt": False},
        "where use_idwt is False",
    ),
}
"""Options that PEFT accepts and ignores, alone or together with others."""

UNSUPPORTED = {
    ("BOFT", "boft_n_butterfly_factor"): ({"boft_n_butterfly_factor": 2}, "would ignore"),
    ("LORA", "alora_invocation_tokens"): ({"alora_invocation_tokens": [1]}, "not supported"),
    ("LORA", "arrow_config"): ({"arrow_config": {}}, "not supported"),
    ("LORA", "kasa_config"): ({"kasa_config": {}}, "not supported"),
    ("LORA", "layer_replication"): ({"layer_replication": [[0, 2]]}, "not supported"),
    ("LORA", "megatron_config"): ({"megatron_config": {}}, "not supported"),
    ("LORA", "monteclora_config"): ({"monteclora_config": {}}, "not supported"),
    ("PVERA", "sample_at_inference"): ({"sample_at_inference": True}, "random numbers"),
    ("VBLORA", "save_only_topk_weights"): ({"save_only_topk_weights": True}, "cannot load"),
}
WITHOUT_OUTPUT = {("FROD", "progressbar"), ("FROD", "runtime_offload_base_weight")}
"""Options that concern the display and the memory of the process that initializes the adapter."""

OUT_OF_RANGE = {
    "alpha of LoRA": ("LORA", {"lora_alpha": -8}, "lora_alpha must be positive, not -8"),
    "no alpha": ("LORA", {"lora_alpha": 0}, "lora_alpha must be positive, not 0"),
    "rank": ("LOHA", {"r": 0}, "r must be positive, not 0"),
    "group size": ("LORA", {"qalora_group_size": 0}, "qalora_group_size must be positive, not 0"),
    "factor": ("LOKR", {"decompose_factor": -5}, "decompose_factor must be positive, or -1"),
    "scaling": ("FOURIERFT", {"scaling": -1.0}, "scaling must be positive, not -1.0"),
    "depth": ("PEANUT", {"depth": -1}, "depth must not be negative, not -1"),
    "sparsity": ("SUPERTUNING", {"sparsity": 1.5}, r"sparsity must lie in \[0, 1\], not 1.5"),
    "dropout": ("HIRA", {"hira_dropout": 1.0}, r"hira_dropout must lie in \[0, 1\), not 1.0"),
    "no tokens": ("LORA", {"trainable_token_indices": []}, "at least one token index"),
    "no tokens of a module": (
        "LORA",
        {"trainable_token_indices": {"embed_tokens": []}},
        r"trainable_token_indices\['embed_tokens'\] must have at least one token index",
    ),
    "tokens of no module": ("LORA", {"trainable_token_indices": {}}, "at least one module"),
    "tokens twice": (
        "LORA",
        {"trainable_token_indices": {"embed_tokens": [3, 3]}},
        "more than once",
    ),
    "no token alone": ("TRAINABLE_TOKENS", {"token_indices": []}, "at least one token index"),
}


def fingerprint(peft_type, options, folder):
    """Return all that two training steps and the saved file depend on."""
    torch.manual_seed(0)
    model = attach(tiny_model(), AdapterSpec(peft_type, options)).train()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    initial = [(name, p.shape, p.double().sum().item()) for name, p in trained]
    noise = torch.Generator().manual_seed(0)
    for _, parameter in trained:
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=noise))
    optimizer = torch.optim.AdamW([p for _, p in trained], lr=0.05)
    torch.manual_seed(3)
    losses = []
    for _ in range(2):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS).logits.double().sum().item()
    save_adapter(model, folder)
    saved = load_file(folder / "adapter_model.safetensors")
    return initial, losses, logits, sorted((key, value.shape) for key, value in saved.items())


@cache
def reference(peft_type, companions, folder):
    """Return the fingerprint without the option, and without companions that need it."""
    try:
        return fingerprint(peft_type, BASES[peft_type] | dict(companions), folder)
    except InvalidSpecError:
        return fingerprint(peft_type, BASES[peft_type], folder)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.mark.parametrize(
    ("peft_type", "option"), [(name, option) for name in EFFECTS for option in EFFECTS[name]]
)
def test_an_accepted_option_changes_the_adapter(peft_type, option, scratch):
    value, companions = EFFECTS[peft_type][option]
    options = BASES[peft_type] | companions | {option: value}
    assert fingerprint(peft_type, options, scratch) != reference(
        peft_type, tuple(companions.items()), scratch
    )


@pytest.mark.parametrize("case", IGNORED | UNSUPPORTED, ids=" ".join)
def test_an_option_without_effect_is_refused(case):
    options, message = (IGNORED | UNSUPPORTED)[case]
    with pytest.raises(InvalidSpecError, match=f"(?s){message}") as caught:
        attach(tiny_model(), AdapterSpec(case[0], BASES[case[0]] | options))
    assert case[1] in str(caught.value)


@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_an_option_out_of_range_is_refused(case):
    peft_type, options, message = OUT_OF_RANGE[case]
    with pytest.raises(InvalidSpecError, match=message):
        attach(tiny_model(), AdapterSpec(peft_type, BASES[peft_type] | options))


@pytest.mark.parametrize("peft_type", BASES)
def test_every_option_of_a_method_is_in_one_of_the_tables(peft_type):
    known = set(EFFECTS.get(peft_type, ()))
    known |= {o for name, o in [*IGNORED, *UNSUPPORTED, *WITHOUT_OUTPUT] if name == peft_type}
    fields = dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[peft_type])
    options = {field.name for field in fields if field.init} - COMMON
    assert options - known <= {"mask_type"}  # SHiRA's has one value
