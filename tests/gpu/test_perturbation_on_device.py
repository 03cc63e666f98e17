"""A perturbed pass equals the paper's formula in both dtypes, within rounding, on each device."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.gpu.devices import DEVICES
from tests.perturbation.reference import Down, loss_and_gradients, reference_weights
from tests.tiny import tiny_model
from trans_peft.domain.recipe import Perturbation
from trans_peft.perturbation import perturbed
from trans_peft.rounding import difference_beyond_rounding

LAYERS, SEED = 3, 3
BOTH = Perturbation(masking_p=0.3, dropping_p=0.4)
DOWN = Down(("base_model.model.model.layers.{}.mlp.down_proj.weight",))
ROUNDINGS = 8  # of a whole model


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_perturbed_pass_equals_the_formula(device, dtype):
    base = tiny_model(layers=LAYERS, hidden=64).to(device, dtype)
    config = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(base, config).train()
    ids = (torch.arange(60) * 7 % 250).view(3, 20).to(device)
    plain, _ = loss_and_gradients(model, ids)
    weights = reference_weights(model, DOWN, BOTH, layers=LAYERS, seed=SEED)
    expected, expected_gradients = loss_and_gradients(model, ids, weights)
    with perturbed(model, BOTH, seed=SEED):
        found, found_gradients = loss_and_gradients(model, ids)
    assert difference_beyond_rounding(found, expected, ROUNDINGS) is None
    assert difference_beyond_rounding(found, plain, ROUNDINGS) is not None
    together, expected_together = (
        torch.cat([gradient.flatten() for gradient in gradients.values()]).to(dtype)
        for gradients in (found_gradients, expected_gradients)
    )
    assert difference_beyond_rounding(together, expected_together, ROUNDINGS) is None
