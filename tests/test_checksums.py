"""Checksums detect every change of a model's content, and report no other changes."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, normalizers, processors
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from tests.tiny import tiny_model, tiny_tokenizer, write_tiny_base
from trans_peft.checksums import model_checksums
from trans_peft.domain.recipe import Perturbation
from trans_peft.errors import UnsupportedModelError
from trans_peft.models import load_base
from trans_peft.perturbation import perturbed
from trans_peft.transfer.load_adapter import attached

IDS = torch.arange(12)[None]


def weight(model):
    return model.model.layers[0].self_attn.q_proj.weight


def by_numpy(model):
    weight(model).detach().numpy()[3, 4] += 1


def swap_two_values(model):
    data = weight(model).data.view(-1)
    data[[5, 700]] = data[[700, 5]]


def swap_two_rows(model):
    rows = model.model.embed_tokens.weight.data
    rows[[1, 200]] = rows[[200, 1]]


def untie(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def patch_forward(model):
    norm = model.model.norm
    norm.forward = lambda hidden: 2 * type(norm).forward(norm, hidden)


def leave_perturbed(model):
    model.left = perturbed(model.train(), Perturbation(masking_p=0.5), seed=1)
    model.left.__enter__()


def merge(model):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config).merge_and_unload()


def layer_with_own_config(model):
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    model.model.layers[0].self_attn.config = config


CHANGES = {
    "a value through .data": lambda m: weight(m).data.view(-1)[7].add_(1e-3),
    "a sign": lambda m: weight(m).data.view(-1)[7:8].neg_(),
    "a value in numpy": by_numpy,
    "two values swapped": swap_two_values,
    "two rows swapped": swap_two_rows,
    "everything negated": lambda m: m.lm_head.weight.data.neg_(),
    "a buffer": lambda m: m.model.rotary_emb.inv_freq.mul_(2),
    "a dtype": lambda m: m.model.layers[1].to(torch.bfloat16),
    "a head that is no longer tied": untie,
    "resized embeddings": lambda m: m.resize_token_embeddings(300),
    "a merged adapter": merge,
    "an adapter": lambda m: get_peft_model(m, LoraConfig(target_modules=["q_proj"])),
    "a saved module": lambda m: get_peft_model(
        m, LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])
    ),
    "a perturbation": leave_perturbed,
    "a hook": lambda m: m.model.norm.register_forward_hook(lambda _, __, out: 2 * out),
    "a hook before": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "a patched forward": patch_forward,
    "a scale": lambda m: setattr(m.model.layers[0].self_attn, "scaling", 9.0),
    "a norm's epsilon": lambda m: setattr(m.model.norm, "variance_epsilon", 1.0),
    "use_cache": lambda m: setattr(m.config, "use_cache", False),
    "a nested setting": lambda m: m.config.rope_parameters.update(rope_theta=1.0),
    "how it generates": lambda m: setattr(m.generation_config, "repetition_penalty", 2.0),
    "frozen": lambda m: weight(m).requires_grad_(False),
    "a layer's own configuration": layer_with_own_config,
    "gradients": lambda m: m(input_ids=IDS).logits.sum().backward(),
    "a layer less": lambda m: m.model.layers.__delitem__(1),
    "layers in another order": lambda m: m.model.layers.insert(0, m.model.layers.pop(1)),
}
TOKENIZER_CHANGES = {
    "a chat template": lambda t: setattr(t, "chat_template", "{{ messages }}"),
    "another end": lambda t: setattr(t, "eos_token", "<pad>"),
    "a token more": lambda t: t.add_tokens(["<new>"]),
    "a normalizer": lambda t: setattr(t.backend_tokenizer, "normalizer", normalizers.Lowercase()),
    "a post-processor": lambda t: setattr(
        t.backend_tokenizer,
        "post_processor",
        processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 256)]),
    ),
    "a token that strips": lambda t: t.add_tokens([AddedToken("h", lstrip=True)]),
    "a token that is special": lambda t: t.add_tokens([AddedToken("h", special=True)]),
    "special tokens as text": lambda t: setattr(
        t.backend_tokenizer, "encode_special_tokens", not t.backend_tokenizer.encode_special_tokens
    ),
    "the other side": lambda t: setattr(t, "padding_side", "left" * (t.padding_side == "right")),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_base_is_loaded_again(change, base):
    loaded = load_base(base, "float32", "cpu")
    CHANGES[change](loaded.model)
    again = load_base(base, "float32", "cpu")
    assert again.model is not loaded.model
    assert not model_checksums(again.model).changes(model_checksums(fresh(base)))


@pytest.mark.parametrize("change", TOKENIZER_CHANGES)
def test_a_changed_tokenizer_is_loaded_again(change, base):
    loaded = load_base(base, "float32", "cpu")
    TOKENIZER_CHANGES[change](loaded.tokenizer)
    again = load_base(base, "float32", "cpu")
    assert again.tokenizer is not loaded.tokenizer
    assert len(again.tokenizer) == len(tiny_tokenizer())


def fresh(base):
    loaded = load_base(base, "float32", "cpu")
    return type(loaded.model).from_pretrained(base).eval()


UNCHANGED = {
    "a forward pass": lambda m: m(input_ids=IDS),
    "training mode": lambda m: m.train(),
    "an answer": lambda m: m.generate(input_ids=IDS, max_new_tokens=3, do_sample=False),
    "a version counter": lambda m: weight(m).copy_(weight(m).clone()),
    "a parametrization that is removed again": lambda m: parametrize_and_back(m),
}


def parametrize_and_back(model):
    module = model.model.layers[0].self_attn.q_proj
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())
    nn.utils.parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


def test_calling_a_tokenizer_does_not_change_it(base):
    loaded = load_base(base, "float32", "cpu")
    loaded.tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert load_base(base, "float32", "cpu").tokenizer is loaded.tokenizer
    assert loaded.tokenizer(["a", "abc"], padding=True)["attention_mask"] == [[1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("use", UNCHANGED)
def test_an_unchanged_base_is_not_loaded_again(use, base):
    loaded = load_base(base, "float32", "cpu")
    with torch.no_grad():
        UNCHANGED[use](loaded.model)
    again = load_base(base, "float32", "cpu")
    assert again.model is loaded.model
    assert not again.model.training


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
    st.integers(1, 70_000),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_one_byte_anywhere_changes_the_checksum(dtype, size, data):
    module = nn.Module()
    values = torch.zeros(size, dtype=dtype)
    module.register_buffer("values", values)
    before = model_checksums(module)
    raw = values.view(torch.uint8).numpy()
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= np.uint8(1)
    assert before.changes(model_checksums(module)) == ["values"]
    raw[position] ^= np.uint8(1)
    assert not before.changes(model_checksums(module))


def test_scalars_empty_tensors_views_and_meta_tensors_have_checksums():
    module = nn.Module()
    module.register_buffer("scalar", torch.tensor(3.0))
    module.register_buffer("empty", torch.zeros(0, 4))
    module.register_buffer("meta", torch.zeros(2, device="meta"))
    module.register_buffer("view", torch.arange(20.0).reshape(4, 5).T[1:, ::2])
    before = model_checksums(module)
    module.view[0, 1] += 1
    module.scalar += 1
    assert before.changes(model_checksums(module)) == ["scalar", "view"]


def test_the_base_is_restored_after_an_adapter_on_expert_parameters(tmp_path):
    """PEFT parametrizes experts in every forward pass, which raises their version counters."""

    def mixtral():
        torch.manual_seed(0)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
            )
        ).eval()  # fmt: skip

    torch.manual_seed(1)
    config = LoraConfig(
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(mixtral(), config).eval()
    adapted.save_pretrained(tmp_path)
    model = mixtral()
    before = model_checksums(model)
    with torch.no_grad():
        bare = model(input_ids=IDS).logits
        with attached(model, tmp_path) as reloaded:
            assert torch.equal(reloaded(input_ids=IDS).logits, adapted(input_ids=IDS).logits)
        assert torch.equal(model(input_ids=IDS).logits, bare)
    assert not before.changes(model_checksums(model))


def test_a_write_without_a_version_counter_is_reported(tmp_path):
    get_peft_model(
        tiny_model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    ).save_pretrained(tmp_path)
    model = tiny_model()
    with (
        pytest.raises(UnsupportedModelError, match=r"model.norm.weight"),
        attached(model, tmp_path),
    ):
        model.model.norm.weight.data.add_(1)
