"""Bottleneck adapters with compensated modules: several in one model, unloading, invalid names."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from tests.tiny import tiny_model
from trans_peft.methods.bottleneck import BottleneckConfig
from trans_peft.methods.registration import register_methods

register_methods()

IDS = torch.arange(40).reshape(4, 10)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def bottleneck(folder, *, seed=1, **options):
    """Write a bottleneck adapter with random weights; compensated modules have random matrices."""
    torch.manual_seed(seed)
    config = BottleneckConfig(
        **{"bottleneck_dim": 4, "init_bottleneck_weights": False, "compensation_rank": 2} | options,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(tiny_model(), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "compensation_B" in name:
                weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


COMPENSATED = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
KINDS = {
    "both": {},
    "both, compensated": {"compensated_modules": COMPENSATED},
    "ffn": {"target_modules": ["mlp"]},
    "ffn, compensated": {"target_modules": ["mlp"], "compensated_modules": COMPENSATED},
    "last": {"target_modules": ["o_proj", "down_proj"]},
    "last, compensated": {
        "target_modules": ["o_proj", "down_proj"],
        "compensated_modules": COMPENSATED,
    },
}
TOGETHER = {
    ("both", "both, compensated"),
    ("both", "ffn"),
    ("both, compensated", "ffn"),
    ("ffn", "ffn, compensated"),
    ("last", "last, compensated"),
}


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_bottleneck_adapters_share_a_base_exactly_or_not_at_all(first, second, tmp_path):
    folders = [
        bottleneck(tmp_path / str(seed), seed=seed, **KINDS[kind])
        for seed, kind in enumerate((first, second))
    ]
    model = PeftModel.from_pretrained(tiny_model(), folders[0], adapter_name="first")
    if first != second and not {(first, second), (second, first)} & TOGETHER:
        with pytest.raises(ValueError, match=r"do not fit into one model|not found in the base"):
            model.load_adapter(folders[1], "second")
        return
    model.load_adapter(folders[1], "second")
    model.save_pretrained(tmp_path / "saved")
    for name, folder in zip(("first", "second"), folders, strict=True):
        model.set_adapter(name)
        alone = logits(PeftModel.from_pretrained(tiny_model(), folder))
        assert torch.equal(logits(model), alone)
        saved = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved" / name)
        assert torch.equal(logits(saved), alone)


def test_a_target_inside_another_one_is_refused():
    config = BottleneckConfig(target_modules=["self_attn", "o_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="a sub-layer and a module inside it"):
        get_peft_model(tiny_model(), config)


def test_a_compensated_adapter_stays_trainable_beside_another_one(tmp_path):
    first, second = (
        bottleneck(tmp_path / str(seed), seed=seed, compensated_modules=COMPENSATED)
        for seed in range(2)
    )
    model = PeftModel.from_pretrained(tiny_model(), first, adapter_name="first", is_trainable=True)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("compensation" in name for name in trained)
    model.load_adapter(second, "second")
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == trained


def test_bottleneck_adapters_of_single_rows_are_refused(tmp_path):
    model = PeftModel.from_pretrained(
        tiny_model(), bottleneck(tmp_path / "0"), adapter_name="first"
    )
    with pytest.raises(ValueError, match="cannot be selected for each row of a batch"):
        model(input_ids=torch.arange(8).reshape(2, 4), adapter_names=["first", "__base__"])


@pytest.mark.parametrize(
    "name", ["model.layers.9.mlp.up_proj", "model.embed_tokens", "lm_head.x", ""]
)
def test_a_compensated_module_that_is_not_linear_is_named(name, tmp_path):
    config = BottleneckConfig(compensated_modules=[name], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=f"the base has no linear module '{name}'"):
        get_peft_model(tiny_model(), config)


def test_merging_a_compensated_adapter_is_refused_and_unloading_restores_the_base(tmp_path):
    folder = bottleneck(tmp_path / "0", target_modules=["mlp"], compensated_modules=COMPENSATED)
    model = PeftModel.from_pretrained(tiny_model(), folder)
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.merge_and_unload()
    bare = PeftModel.from_pretrained(tiny_model(), folder).unload()
    assert torch.equal(logits(bare), logits(tiny_model()))
    assert list(bare.state_dict()) == list(tiny_model().state_dict())
