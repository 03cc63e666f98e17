import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from tests.tiny import tiny_model, tiny_tokenizer
from tests.transfer.conftest import edit_config
from trans_peft.errors import AdapterError, UnsupportedModelError
from trans_peft.transfer.effect import PROBE_PROMPTS, probe_effect
from trans_peft.transfer.load_adapter import attached


def test_the_effect_is_the_largest_change_of_a_logit(write_adapter):
    folder, tokenizer = write_adapter(), tiny_tokenizer()
    with attached(tiny_model(), folder) as model:
        effect = probe_effect(model, tokenizer)
    bare, adapted = tiny_model(), PeftModel.from_pretrained(tiny_model(), folder).eval()
    changes = [
        (adapted(tokens).logits - bare(tokens).logits).abs().max().item()
        for tokens in (
            tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROBE_PROMPTS
        )
    ]
    assert effect.max_logit_change == max(changes) > 0
    assert effect.found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": True},  # B = 0
        {"lora_alpha": 0, "init_lora_weights": False},
        {"init_lora_weights": True, "target_modules": "all-linear"},
    ],
)
def test_an_adapter_without_effect_returns_exactly_zero(options, dtype):
    config = LoraConfig(**{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options)
    model = get_peft_model(tiny_model().to(dtype), config)
    effect = probe_effect(model, tiny_tokenizer())
    assert effect.max_logit_change == 0
    assert not effect.found


def test_skipped_modules_return_exactly_zero(write_adapter):
    with attached(tiny_model(), write_adapter()) as model:
        for layer in model.get_base_model().model.layers:
            for adapted in (layer.self_attn.q_proj, layer.self_attn.v_proj):
                adapted.forward = adapted.base_layer.forward
        assert not probe_effect(model, tiny_tokenizer()).found


def test_virtual_tokens_are_not_compared(write_adapter):
    config = PromptTuningConfig(
        num_virtual_tokens=3,
        num_layers=2,
        token_dim=32,
        num_attention_heads=4,
        task_type="CAUSAL_LM",
    )
    with attached(tiny_model(), write_adapter(config=config)) as model:
        assert probe_effect(model, tiny_tokenizer()).found


def test_dropout_is_off_and_the_training_mode_is_restored():
    config = LoraConfig(
        target_modules=["q_proj"],
        lora_dropout=0.9,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(tiny_model(), config).train()
    first, second = (probe_effect(model, tiny_tokenizer()) for _ in range(2))
    assert first == second
    assert model.training


def test_logits_that_are_not_finite_are_an_error(write_adapter):
    folder = edit_config(write_adapter(target_modules=["v_proj"]), lora_alpha=1e300)
    with (
        attached(tiny_model(), folder) as model,
        pytest.raises(AdapterError, match="not finite"),
    ):
        probe_effect(model, tiny_tokenizer())


def test_a_base_with_infinite_logits_is_another_error(write_adapter):
    base = tiny_model()
    base.model.norm.weight.data.fill_(float("inf"))
    with (
        attached(base, write_adapter()) as model,
        pytest.raises(UnsupportedModelError, match="logits of the bare base"),
    ):
        probe_effect(model, tiny_tokenizer())
