"""An adapter that passes the check can be saved, attached again and transferred."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from tests.tiny import tiny_model, tiny_tokenizer
from tests.transfer.conftest import fingerprint_of
from trans_peft.checksums import model_checksums
from trans_peft.domain.adapter import AdapterSpec
from trans_peft.errors import InvalidSpecError
from trans_peft.methods import options
from trans_peft.methods.specs import attach
from trans_peft.models import LoadedBase
from trans_peft.training import adapter_check
from trans_peft.training.adapter_check import check_adapter_is_trainable, save_adapter
from trans_peft.transfer.compatibility import compare
from trans_peft.transfer.load_adapter import attached, rebind_adapter
from trans_peft.validation.decoding.generation import generate

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
PROMPTS = [[35, 36, 37, 38], [40, 41], [50] * 7]
QV = {"target_modules": ["q_proj", "v_proj"]}


def mixtral(seed=0):
    torch.manual_seed(seed)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, eos_token_id=257,
        )
    )  # fmt: skip


def untied(seed=0):
    torch.manual_seed(seed)
    model = tiny_model(seed)
    model.config.tie_word_embeddings = False
    return type(model)(model.config)


LORA = {
    "attention": QV,
    "all linear": {"target_modules": "all-linear"},
    "rslora": {**QV, "use_rslora": True},
    "dora": {**QV, "use_dora": True},
    "biases of its own": {**QV, "lora_bias": True},
    "gaussian": {**QV, "init_lora_weights": "gaussian"},
    "orthogonal": {**QV, "init_lora_weights": "orthogonal"},
    "mica": {**QV, "init_lora_weights": "mica"},
    "velora": {**QV, "velora_config": {"num_groups": 8}},
    "ranks": {**QV, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "one layer": {**QV, "layers_to_transform": [1]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "embedding by expression": {"target_modules": r".*(q_proj|embed_tokens)"},
    "saved norm": {**QV, "modules_to_save": ["norm"]},
    "saved embedding": {**QV, "modules_to_save": ["embed_tokens"]},
    "saved head": {**QV, "modules_to_save": ["lm_head"]},
    "saved both": {**QV, "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved FFN": {**QV, "modules_to_save": ["mlp"]},
    "tokens": {**QV, "trainable_token_indices": [3, 4]},
    "tokens of the head": {**QV, "trainable_token_indices": {"lm_head": [3]}},
    "parameters": {"target_modules": [], "target_parameters": ["mlp.gate_proj.weight"]},
}
METHODS = {
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "BEFT": QV,
    "BOFT": {**QV, "boft_block_size": 4},
    "BOTTLENECK": {"bottleneck_dim": 4},
    "C3A": {**QV, "block_size": 8},
    "DEFT": QV,
    "DELORA": QV,
    "FOURIERFT": {**QV, "n_frequency": 20},
    "FROD": QV,
    "GLORA": QV,
    "GRALORA": {**QV, "r": 8, "gralora_k": 2},
    "HIRA": QV,
    "HRA": QV,
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["norm", "input_layernorm"]},
    "LOHA": QV,
    "LOKR": QV,
    "MISS": {**QV, "r": 4},
    "OFT": {**QV, "oft_block_size": 4},
    "OSF": QV,
    "PEANUT": QV,
    "PSOFT": {**QV, "r": 4},
    "PVERA": {"target_modules": ["q_proj", "o_proj"]},
    "RANDLORA": {"target_modules": ["q_proj", "o_proj"]},
    "ROAD": {**QV, "group_size": 8},
    "SHIRA": {**QV, "r": 2},
    "SUPERTUNING": QV,
    "TINYLORA": QV,
    "TRAINABLE_TOKENS": {"token_indices": [3, 32]},
    "UNILORA": {**QV, "theta_d_length": 64},
    "VBLORA": {**QV, "num_vectors": 8, "vector_length": 8, "topk": 2},
    "VERA": {"target_modules": ["q_proj", "o_proj"], "save_projection": False},
    "WAVEFT": {**QV, "n_frequency": 20},
}
MIXTRAL = {
    "experts": {
        **QV,
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "experts' ranks": {
        "target_modules": [],
        "target_parameters": ["mlp.experts.down_proj"],
        "rank_pattern": {"mlp.experts.down_proj": 2},
    },
    "router": {**QV, "modules_to_save": ["gate"]},
}
CASES = [
    *(pytest.param(tiny_model, "LORA", o, id=f"LORA {name}") for name, o in LORA.items()),
    *(
        pytest.param(untied if name == "TRAINABLE_TOKENS" else tiny_model, name, o, id=name)
        for name, o in METHODS.items()
    ),
    *(pytest.param(mixtral, "LORA", o, id=f"Mixtral {name}") for name, o in MIXTRAL.items()),
    *(
        pytest.param(untied, "LORA", LORA[name], id=f"untied {name}")
        for name in ("embedding", "saved embedding", "saved head", "saved both", "tokens")
    ),
]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.filterwarnings(
    "default::RuntimeWarning"
)  # PEFT ignores target_parameters in this warning
@pytest.mark.parametrize(("make", "peft_type", "given"), CASES)
def test_an_accepted_adapter_survives_training_saving_and_transfer(
    make, peft_type, given, tmp_path
):
    base = LoadedBase(make().eval(), tiny_tokenizer())
    before = model_checksums(base.model)
    spec = AdapterSpec(peft_type, given)
    check_adapter_is_trainable(base, spec, tmp_path)
    assert not before.changes(model_checksums(base.model))
    torch.manual_seed(0)
    model = attach(base.model, spec).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(model.eval(), tmp_path / "trained")
    old, new = make().eval(), make(seed=1).eval()
    with attached(old, tmp_path / "trained") as again:
        assert torch.equal(logits(again), logits(model))
        ours = generate(again, base.tokenizer, PROMPTS, max_new_tokens=4).ids
        assert ours == [one_by_one(again, prompt) for prompt in PROMPTS]
    fit = compare(fingerprint_of(old), fingerprint_of(old), tmp_path / "trained")
    assert fit.ok, fit.mismatches
    moved = rebind_adapter(
        tmp_path / "trained", tmp_path / "moved", base_name="x", base_revision="y"
    )
    with attached(new, moved) as transferred:
        assert logits(transferred).isfinite().all()


def one_by_one(model, prompt):
    ids = list(prompt)
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 257:
            break
    return ids[len(prompt) :]


REFUSED = {
    "an alpha of zero": ("LORA", {"lora_alpha": 0}, "lora_alpha must be positive"),
    "biases of the base": ("LORA", {"bias": "all"}, "biases of the base"),
    "no target": ("LORA", {"target_modules": ["nothing"]}, "'nothing' matches no module"),
    "a tied embedding saved whole": (
        "LORA",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        "lm_head.weight",
    ),
    "weights of the base": ("LORA", {"init_lora_weights": "pissa"}, "rewrites the weights"),
    "a part of a vector bank": (
        "VBLORA",
        {"num_vectors": 16, "vector_length": 16, "save_only_topk_weights": True},
        "cannot load the saved file again",
    ),
    "random inference": (
        "PVERA",
        {"target_modules": ["q_proj", "o_proj"], "sample_at_inference": True},
        "not reproducible",
    ),
    "the head": ("LORA", {"target_modules": ["lm_head"]}, "targets the output embedding"),
    "the head and a projection": (
        "LORA",
        {"target_modules": ["lm_head", "q_proj"]},
        "targets the output embedding",
    ),
    "embedding and head": (
        "LORA",
        {"target_modules": ["embed_tokens", "lm_head"]},
        "targets the output embedding|cannot be",
    ),
    "an adapter on tied embeddings": (
        "LORA",
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        "targets the output embedding",
    ),
    "tokens and the tied head": (
        "LORA",
        {"trainable_token_indices": [1], "modules_to_save": ["lm_head"]},
        "cannot",
    ),
    "no tokens": ("LORA", {"trainable_token_indices": []}, "at least one token index"),
    "modules without weights": (
        "LORA",
        {"modules_to_save": ["rotary_emb", "act_fn"]},
        "'rotary_emb' matches only modules without weights; .*'act_fn' matches only",
    ),
    "an exclusion of no target": (
        "LORA",
        {"exclude_modules": ["gate_proj"]},
        "'gate_proj' excludes no targeted module",
    ),
    "an exclusion by expression": (
        "LORA",
        {"exclude_modules": ".*gate_proj"},
        "excludes no targeted module",
    ),
    "a module whose forward pass fails": ("DELORA", {"modules_to_save": ["norm"]}, "be trained"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unusable_adapter_is_refused_before_it_is_trained(case, tmp_path):
    peft_type, options, message = REFUSED[case]
    base = LoadedBase(tiny_model().eval(), tiny_tokenizer())
    before = model_checksums(base.model)
    with pytest.raises(InvalidSpecError, match=f"(?s){message}") as caught:
        check_adapter_is_trainable(base, AdapterSpec(peft_type, QV | options), tmp_path)
    assert "\n  do:" in str(caught.value)
    assert not before.changes(model_checksums(base.model))
    assert not any(tmp_path.iterdir())


def test_trainable_tokens_of_a_tied_base_are_refused(tmp_path):
    base = LoadedBase(tiny_model().eval(), tiny_tokenizer())
    with pytest.raises(InvalidSpecError, match="shares its weight"):
        check_adapter_is_trainable(
            base, AdapterSpec("TRAINABLE_TOKENS", {"token_indices": [72, 73]}), tmp_path
        )


def test_an_adapter_that_changes_no_logit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_check, "_NOISE", 0.0)
    base = LoadedBase(tiny_model().eval(), tiny_tokenizer())
    with pytest.raises(InvalidSpecError, match="change no logit"):
        check_adapter_is_trainable(base, AdapterSpec("LORA", QV), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_with_random_logits_is_refused(tmp_path, monkeypatch, dtype):
    """The comparison itself, with a method that the tables of options do not name."""
    monkeypatch.setattr(options, "_NOT_EVALUABLE", {})
    base = LoadedBase(tiny_model().to(dtype).eval(), tiny_tokenizer())
    spec = AdapterSpec(
        "PVERA", {"target_modules": ["q_proj", "o_proj"], "r": 8, "sample_at_inference": True}
    )
    with pytest.raises(InvalidSpecError, match="two forward passes in evaluation mode differ"):
        check_adapter_is_trainable(base, spec, tmp_path)
