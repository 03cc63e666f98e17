"""Each architecture against the formulas, given the same draws."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.perturbation.architectures import ARCHITECTURES, LAYERS
from tests.perturbation.reference import Down, loss_and_gradients, reference_weights
from trans_peft.domain.recipe import Perturbation
from trans_peft.perturbation import perturbed

IDS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))
SEED = 0  # drops the FFN of layer 0 and the attention of layers 0 and 1, keeps the others
MASKING_AND_DROPPING = Perturbation(masking_p=0.4, dropping_p=0.4)

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)


def agree(model, perturbation, down, *, kind="ffn", rtol=1e-4, atol=1e-6):
    weights = reference_weights(model, down, perturbation, layers=LAYERS, seed=SEED, kind=kind)
    logits, gradients = loss_and_gradients(model, IDS, weights)
    with perturbed(model, perturbation, seed=SEED) as handle:
        our_logits, our_gradients = loss_and_gradients(model, IDS)
    torch.testing.assert_close(our_logits, logits, rtol=rtol, atol=atol)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            our_gradients[name], gradient, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    return handle


@architectures
def test_masking_and_dropping_the_ffn_are_the_formulas(architecture):
    handle = agree(architecture.model(), MASKING_AND_DROPPING, architecture.ffn)
    assert bool(handle.multiplied) is not architecture.sliced


@architectures
def test_masking_and_dropping_the_attention_are_the_formulas(architecture):
    perturbation = Perturbation(0.4, 0.4, where="attention")
    agree(architecture.model(), perturbation, architecture.attention, kind="attention")


@architectures
def test_the_formulas_hold_through_lora_on_the_ffn(architecture):
    if not architecture.lora:
        pytest.skip("its experts are weights, not layers")
    config = LoraConfig(r=3, target_modules=list(architecture.lora), init_lora_weights=False)
    model = get_peft_model(architecture.model(), config)
    prefix = "base_model.model."
    (down,) = architecture.ffn.weights
    stem = prefix + down.removesuffix(".weight")
    # Both branches take the masked neurons in; a LoRA matrix A lies as a Linear's weight does.
    base = Down(
        (f"{stem}.base_layer.weight",),
        architecture.ffn.axis,
        tuple(prefix + b.replace(".bias", ".base_layer.bias") for b in architecture.ffn.biases),
    )
    branch = Down((f"{stem}.lora_A.default.weight",))
    both = {"layers": LAYERS, "seed": SEED}
    weights = reference_weights(model, base, MASKING_AND_DROPPING, **both)
    weights |= reference_weights(model, branch, MASKING_AND_DROPPING, **both)
    # The bias of a base layer is frozen, and a dropped FFN adds none of it.
    logits, gradients = loss_and_gradients(model, IDS, weights)
    with perturbed(model, MASKING_AND_DROPPING, seed=SEED):
        our_logits, our_gradients = loss_and_gradients(model, IDS)
    torch.testing.assert_close(our_logits, logits, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(our_gradients, gradients, rtol=1e-4, atol=1e-6)
