"""The probe against removing a FFN by hand, and the policy on the figures measured on SmolLM2."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import tiny_model
from trans_peft.errors import InvalidSpecError
from trans_peft.perturbation import layer_criticality, propose_spared_layers

IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))


def test_criticality_is_the_loss_that_a_zeroed_ffn_adds():
    model = tiny_model(layers=3).train()
    labels = IDS.clone()
    labels[0, :7] = -100  # batches of unequal weight
    batches = [
        {"input_ids": ids[None], "labels": row[None]} for ids, row in zip(IDS, labels, strict=True)
    ]
    found = layer_criticality(model, batches)
    assert model.training
    assert not any("forward" in module.__dict__ for module in model.modules())
    model.eval()
    with torch.no_grad():
        whole = model(input_ids=IDS, labels=labels).loss
        for layer, added in enumerate(found):
            name = f"model.layers.{layer}.mlp.down_proj.weight"
            without = torch.func.functional_call(
                model,
                {name: torch.zeros(32, 64)},
                (),
                {"input_ids": IDS, "labels": labels},
            )
            assert added == pytest.approx((without.loss - whole).item(), abs=1e-5)


def test_a_batch_without_labels_is_refused():
    with pytest.raises(InvalidSpecError, match="no token of the batches has a label"):
        layer_criticality(tiny_model(), [{"input_ids": IDS, "labels": torch.full_like(IDS, -100)}])


def test_the_layers_that_stand_out_are_spared():
    smollm2 = [0.18] * 30
    smollm2[0], smollm2[2], smollm2[11], smollm2[28], smollm2[29] = 9.7, 0.6, 1.5, 0.6, 1.55
    assert propose_spared_layers(smollm2) == (0, 2, 11, 28, 29)
    assert propose_spared_layers(smollm2, times_median=5) == (0, 11, 29)
    assert propose_spared_layers([]) == ()


@given(st.lists(st.floats(0.01, 10), min_size=1), st.sampled_from([0.25, 2.0, 64.0]))
def test_a_policy_spares_at_most_half_and_does_not_depend_on_the_unit(criticality, scale):
    spared = propose_spared_layers(criticality)
    assert len(spared) <= len(criticality) / 2
    assert propose_spared_layers([value * scale for value in criticality]) == spared
