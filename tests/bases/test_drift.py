import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import tiny_model, tiny_tokenizer
from trans_peft.bases.checkpoint import folder_checkpoint
from trans_peft.bases.drift import sampled_drift, weight_drift
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.bases.sublayers import OTHER, sublayers
from trans_peft.edges.file_store import FileStore
from trans_peft.errors import UnsupportedModelError


def saved(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def sampled(old, new):
    """`sampled_drift` of two folders, computed in this process."""
    prints = [fingerprint(str(folder), FileStore()) for folder in (old, new)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "trans_peft.bases.drift.call_isolated", lambda function, *args, **_: function(*args)
        )
        return sampled_drift(*prints, "the pair")


@pytest.fixture
def v1(tmp_path):
    return saved(tiny_model(), tmp_path / "v1")


def moved(tmp_path, change):
    """Save v1 with `change(name)` added to each weight, relative to its own size."""
    model = tiny_model()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(1 + change(name))
    return saved(model, tmp_path / "v2")


def test_the_drift_of_a_base_from_itself_is_zero(v1):
    drift = weight_drift(v1, v1)
    assert (drift.attention, drift.ffn, drift.other) == (0, 0, 0)


def test_each_weight_counts_in_its_own_sub_layer_and_layer(v1, tmp_path):
    def change(name):
        if "layers.1.mlp" in name:
            return 0.3
        return 0.2 if "self_attn" in name else 0.1

    drift = weight_drift(v1, moved(tmp_path, change))
    assert drift.attention_by_layer == pytest.approx((0.2, 0.2), rel=1e-5)
    assert drift.ffn_by_layer == pytest.approx((0.1, 0.3), rel=1e-5)
    assert drift.attention == pytest.approx(0.2, rel=1e-5)
    assert drift.other == pytest.approx(0.1, rel=1e-5)


def test_the_total_is_the_norm_over_all_layers(v1, tmp_path):
    v2 = moved(tmp_path, lambda name: 0.5 if "layers.0.mlp" in name else 0.0)
    first, second = (
        torch.cat([w.flatten() for w in layer.mlp.parameters()])
        for layer in tiny_model().model.layers
    )
    expected = 0.5 * first.norm() / torch.cat([first, second]).norm()
    assert weight_drift(v1, v2).ffn == pytest.approx(expected.item(), rel=1e-5)


def test_the_estimate_of_a_scaled_weight_is_exact(v1, tmp_path):
    v2 = moved(tmp_path, lambda name: 0.5 if "layers.0.mlp" in name else 0.0)
    exact, estimate = weight_drift(v1, v2), sampled(v1, v2)
    assert estimate.ffn_by_layer == pytest.approx((0.5, 0.0), rel=1e-6)
    assert (estimate.attention, estimate.other) == (0, 0)
    assert estimate.ffn_shift == pytest.approx(exact.ffn_shift, rel=0.2)


def test_the_estimate_of_a_random_change_is_close(v1, tmp_path):
    model = tiny_model()
    generator = torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * weight.std() * torch.randn(weight.shape, generator=generator)
    v2 = saved(model, tmp_path / "v2")
    exact, estimate = weight_drift(v1, v2), sampled(v1, v2)
    assert estimate.ffn == pytest.approx(exact.ffn, rel=0.2)
    assert estimate.attention == pytest.approx(exact.attention, rel=0.2)


def test_names_of_other_checkpoints_are_assigned_to_their_sub_layers(tmp_path):
    """Experts one by one, as Mixtral's files have them, and names without the model's prefix."""
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    mixtral = AutoConfig.for_model(
        "mixtral", **options, intermediate_size=24, num_local_experts=2, num_key_value_heads=2
    )
    gpt2 = AutoConfig.for_model("gpt2", **options, vocab_size=258)
    for config, shorten, down in (
        (mixtral, lambda name: name, "model.layers.0.block_sparse_moe.experts.1.w2.weight"),
        (gpt2, lambda name: name.removeprefix("transformer."), "h.0.mlp.c_proj.weight"),
    ):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        checkpoint = folder_checkpoint(tmp_path)
        shapes = {shorten(name): found.shape for name, found in checkpoint.tensors.items()}
        found = sublayers(checkpoint.config, shapes)
        assert found[down] == ("ffn", 0)
        assert {("attention", 0), ("ffn", 0), OTHER} == set(found.values())
        del shapes[down]
        with pytest.raises(UnsupportedModelError, match="ffn of layer 0"):
            sublayers(checkpoint.config, shapes)


def test_another_architecture_is_refused_by_its_tensors(v1, tmp_path):
    model = tiny_model()
    del model.model.layers[1]
    model.config.num_hidden_layers = 1
    with pytest.raises(UnsupportedModelError, match=r"only in one of them: model\.layers\.1"):
        weight_drift(v1, saved(model, tmp_path / "v2"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_their_tensor(v1, tmp_path, value):
    model = tiny_model()
    name = "model.layers.1.mlp.up_proj.weight"
    model.get_parameter(name).data[0, 0] = value
    broken = saved(model, tmp_path / "broken")
    with pytest.raises(UnsupportedModelError, match=f"tensor {name} of the new version has values"):
        weight_drift(v1, broken)
    with pytest.raises(UnsupportedModelError, match=f"tensor {name} of the old version has values"):
        weight_drift(broken, v1)
