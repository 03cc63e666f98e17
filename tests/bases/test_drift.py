import pytest
import torch

from tests.tiny import tiny_model
from trans_peft.bases.drift import weight_drift
from trans_peft.errors import UnsupportedModelError


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


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


def test_another_architecture_is_refused_by_its_tensors(v1, tmp_path):
    model = tiny_model()
    del model.model.layers[1]
    model.config.num_hidden_layers = 1
    with pytest.raises(UnsupportedModelError, match=r"only in one of them: model\.layers\.1"):
        weight_drift(v1, saved(model, tmp_path / "v2"))
