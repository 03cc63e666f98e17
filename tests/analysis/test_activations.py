"""Streamed statistics against hooks written out for a Llama, and distances against scipy."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import tiny_model
from trans_peft.analysis.activations import Activations, Moments, measure_activations
from trans_peft.analysis.distances import compare_activations, influence, profile

TEXTS = [[5, 9, 200, 31, 7, 80], [40, 3, 77], [1, 2, 3, 4, 5], [250, 17, 30, 99]]


def by_hooks(model):
    """Return the inputs of each o_proj and down_proj, and each FFN's influence, token by token."""
    layers, seen = model.model.layers, {}

    def keep(name):
        return lambda _, args, *out: seen.__setitem__(name, (out or args)[0][0, 1:])

    for index, layer in enumerate(layers):
        layer.self_attn.o_proj.register_forward_pre_hook(keep(("attention", index)))
        layer.mlp.down_proj.register_forward_pre_hook(keep(("ffn", index)))
        layer.post_attention_layernorm.register_forward_pre_hook(keep(("before", index)))
        layer.register_forward_hook(keep(("after", index)))
    attention, ffn, shares = ([[] for _ in layers] for _ in range(3))
    for text in TEXTS:
        with torch.no_grad():
            model(input_ids=torch.tensor([text]))
        for index in range(len(layers)):
            attention[index].append(seen["attention", index])
            ffn[index].append(seen["ffn", index])
            before, after = (seen[name, index].norm(dim=-1) for name in ("before", "after"))
            shares[index].append((after - before) / before)
    return [[torch.cat(layer) for layer in found] for found in (attention, ffn, shares)]


@pytest.fixture(scope="module")
def old():
    return tiny_model().eval()


@pytest.fixture(scope="module")
def new():
    model = tiny_model().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=torch.manual_seed(1))
    return model


def test_the_moments_are_those_of_hooks_written_out(old):
    found = measure_activations(old, TEXTS)
    attention, ffn, shares = by_hooks(deepcopy(old))
    for recorded, expected in ((found.attention, attention), (found.ffn, ffn)):
        for moments, values in zip(recorded, expected, strict=True):
            assert moments.tokens.sum() == len(values) == sum(map(len, TEXTS)) - len(TEXTS)
            torch.testing.assert_close(moments.first.sum(0), values.double().sum(0))
            torch.testing.assert_close(moments.second.sum(0), values.double().square().sum(0))
    for interval, values in zip(influence(found), shares, strict=True):
        assert interval.value == pytest.approx(values.mean().item(), abs=1e-6)
        assert interval.low <= interval.value <= interval.high
    assert not any("forward" in module.__dict__ for module in old.modules())


def test_the_distance_is_that_of_the_means_and_deviations_of_raw_activations(old, new):
    found = compare_activations(measure_activations(old, TEXTS), measure_activations(new, TEXTS))
    for number, distances in enumerate((found.attention, found.ffn)):
        for layer, distance in enumerate(distances):
            a, b = (by_hooks(deepcopy(m))[number][layer].double() for m in (old, new))
            moved = (b.mean(0) - a.mean(0)) ** 2 + (b.std(0, False) - a.std(0, False)) ** 2
            assert distance.value == pytest.approx(
                (moved.sum() / a.square().mean(0).sum()).sqrt().item(), rel=1e-6
            )
            assert 0 < distance.low <= distance.high


def test_a_base_has_distance_zero_from_itself(old):
    found = compare_activations(measure_activations(old, TEXTS), measure_activations(old, TEXTS))
    for interval in (*found.attention, *found.ffn, found.difference):
        assert (interval.value, interval.low, interval.high) == (0, 0, 0)


def moments_of(values):
    found = Moments.empty(2, (values.shape[1],))
    for block, half in enumerate(values.tensor_split(2)):
        found.add(block, 0, half)
    return found


def activations_of(values):
    zeros = torch.zeros(1, 2, dtype=torch.float64)
    return Activations((None,), (moments_of(values),), zeros, zeros)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 3), st.floats(-2, 2))
def test_each_neuron_counts_at_most_its_wasserstein_distance(seed, scale, shift):
    """By scipy: equal to W2 for a change of location and scale, and at least W1 of one neuron."""
    generator = torch.manual_seed(seed)
    a = torch.randn(40, 1, generator=generator)
    moved = scale * a + shift
    other = torch.randn(40, 1, generator=generator).exp()
    for b, is_tight in ((moved, True), (other, False)):
        found = compare_activations(activations_of(a), activations_of(b)).ffn[0].value
        distance = found * a.square().mean().sqrt().item()
        w2 = (a.sort(0).values - b.sort(0).values).square().mean().sqrt().item()
        assert distance <= w2 + 1e-5
        if is_tight:
            assert distance == pytest.approx(w2, abs=1e-5)
            w1 = wasserstein_distance(a[:, 0].numpy(), b[:, 0].numpy())
            assert distance >= w1 - 1e-5


def test_a_permutation_of_neurons_is_a_change_that_a_histogram_of_the_layer_does_not_show():
    a = torch.randn(40, 8, generator=torch.manual_seed(2)) * torch.arange(1, 9)
    b = a.flip(1)
    assert wasserstein_distance(a.flatten().numpy(), b.flatten().numpy()) < 1e-6
    assert compare_activations(activations_of(a), activations_of(b)).ffn[0].value > 0.5


def test_a_profile_shows_which_neurons_are_large():
    values = torch.ones(10, 512)
    values[:, :2] = 3.0
    shown = profile(moments_of(values))
    assert len(shown) == 256
    assert shown[0] == pytest.approx(3 * shown[1], rel=1e-3) and shown[1] == shown[-1]


@pytest.mark.parametrize(
    ("kind", "options"),
    [("gpt_neox", {}), ("mixtral", {"num_local_experts": 2}), ("opt", {"ffn_dim": 24})],
)
def test_other_architectures_are_measured(kind, options):
    shape = {
        "vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 24, "num_key_value_heads": 2, "bos_token_id": None,
        "eos_token_id": 257, "pad_token_id": 256, "max_position_embeddings": 512,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(shape | options))).eval()
    found = measure_activations(model, TEXTS)
    assert found.attention[0].first.shape == (4, 16) and found.ffn[0].first.shape == (4, 24)
    assert found.attention[0].tokens.sum() == 14 and found.ffn[0].tokens.sum() >= 14
    assert influence(found)[0].value != 0 and found.tokens.sum() == 14
