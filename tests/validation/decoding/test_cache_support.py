"""Models are read as their own forward pass reads a text, or refused."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.tiny import tiny_model, tiny_tokenizer
from trans_peft.errors import UnsupportedModelError
from trans_peft.validation.decoding.cache_support import cache_support
from trans_peft.validation.decoding.generation import generate
from trans_peft.validation.decoding.likelihoods import log_likelihoods
from trans_peft.validation.decoding.prefixes import CacheSupport

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "vocab_size": 260, "hidden_size": 16, "d_model": 16, "num_hidden_layers": 2,
    "decoder_layers": 2, "encoder_layers": 1, "num_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_attention_heads": 2, "intermediate_size": 32,
    "decoder_ffn_dim": 32, "max_position_embeddings": 64, "pad_token_id": 1, "eos_token_id": 256,
    "bos_token_id": 0, "num_experts": 2, "mamba_d_conv": 2, "num_key_value_heads": 2,
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
}  # fmt: skip
PROMPTS = [[5, 6, 7, 8, 9], [20, 21, 22], [4] * 12]
CHOICES = [[[30, 31], [40]], [[50], [51, 52, 53]], [[60, 61], [62]]]


def model_of(kind, **fields):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**SIZES | fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)  # far from uniform, so that errors show
    return model


def plain_log_likelihood(model, prompt, choice):
    """The definition, from one pass over one text."""
    with torch.no_grad():
        log_p = model(torch.tensor([prompt + choice])).logits.float().log_softmax(-1)[0]
    return sum(log_p[len(prompt) + i - 1, token].item() for i, token in enumerate(choice))


MODELS = {
    "llama": ({}, CacheSupport()),
    "bart": ({}, CacheSupport(batched=False)),
    "mbart": ({}, CacheSupport(batched=False)),
    "roberta": ({"is_decoder": True}, CacheSupport(batched=False, positions=False)),
    "jamba": ({"use_mamba_kernels": False}, None),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_choice_has_the_likelihood_of_a_plain_pass_whatever_shares_its_batch(kind):
    fields, support = MODELS[kind]
    model = model_of(kind, **fields)
    found = log_likelihoods(model, list(zip(PROMPTS, CHOICES, strict=True)), batch_size=3)
    expected = [
        [plain_log_likelihood(model, prompt, choice) for choice in choices]
        for prompt, choices in zip(PROMPTS, CHOICES, strict=True)
    ]
    for row, plain in zip(found, expected, strict=True):
        assert row == pytest.approx(plain, abs=2e-3)
    if support is not None:
        assert cache_support(model) == support


@pytest.mark.parametrize("kind", ["bart", "roberta"])
def test_an_answer_is_that_of_plain_greedy_decoding(kind):
    model = model_of(kind, **MODELS[kind][0])

    def greedy(text):
        answer = []
        for _ in range(5):
            with torch.no_grad():
                answer.append(int(model(torch.tensor([text + answer])).logits[0, -1].argmax()))
        return answer

    found = generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=5).ids
    for ids, prompt in zip(found, PROMPTS, strict=True):
        assert ids == greedy(prompt)[: len(ids)]


@pytest.mark.parametrize(
    ("kind", "fields"), [("mamba", {}), ("openai-gpt", {}), ("roberta", {}), ("bert", {})]
)
def test_a_model_without_a_cache_or_that_looks_ahead_is_refused(kind, fields):
    model = model_of(kind, **fields)
    with pytest.raises(UnsupportedModelError, match="cannot be evaluated"):
        cache_support(model)
    with pytest.raises(UnsupportedModelError, match="cannot be evaluated"):
        generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=2)


def test_a_base_is_probed_once_and_its_adapters_share_the_result(monkeypatch):
    from peft import LoraConfig, get_peft_model

    model = tiny_model().eval()
    assert cache_support(model) == CacheSupport()
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("probed again"))
    assert cache_support(get_peft_model(model, LoraConfig(r=2))) == CacheSupport()


def test_broken_weights_are_left_to_decoding():
    model = tiny_model().eval()
    nn.init.constant_(model.lm_head.weight, float("nan"))
    assert cache_support(model) == CacheSupport()


def test_a_broken_adapter_does_not_decide_how_later_adapters_are_read():
    from peft import LoraConfig, get_peft_model

    # Of `v_proj`: some processors compute finite logits from queries that are not finite.
    model = get_peft_model(model_of("bart"), LoraConfig(r=2, target_modules=["v_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.constant_(weight, float("nan"))
    assert cache_support(model) == CacheSupport()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(weight)
    assert cache_support(model) == CacheSupport(batched=False)
