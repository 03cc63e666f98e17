"""Moving the weights of a base while an adapter is trained."""

import pytest
import torch

from study.directions import Direction, cosine, moved
from tests.tiny import tiny_model
from trans_peft.domain.adapter import AdapterSpec
from trans_peft.methods.specs import attach

NAMES = [
    f"model.layers.{layer}.mlp.{name}_proj.weight" for layer in (0, 1) for name in ("up", "down")
]
IDS = torch.arange(8).view(1, 8)


@pytest.fixture
def deltas():
    weights = dict(tiny_model().named_parameters())
    return {name: torch.full_like(weights[name], 0.01) for name in NAMES}


def model():
    spec = AdapterSpec("LORA", {"r": 2, "target_modules": ["q_proj", "up_proj"]})
    return attach(tiny_model(), spec).train()


def ffn_weights(peft_model):
    base = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): weight
        for name, weight in peft_model.named_parameters()
    }
    return {name: base[name].detach().clone() for name in NAMES}


def test_each_step_moves_the_weights_by_another_share_of_the_direction(deltas):
    trained, before = model(), dict(tiny_model().named_parameters())
    shares = []
    with moved(trained, deltas, Direction(1.5), seed=1) as share:
        for _ in range(3):
            trained(input_ids=IDS)
            shares.append(share())
            for name, weight in ffn_weights(trained).items():
                torch.testing.assert_close(weight, before[name] + share() * deltas[name])
    assert len(set(shares)) == 3
    assert all(0 <= one <= 1.5 for one in shares)
    for name, weight in ffn_weights(trained).items():
        assert torch.equal(weight, before[name])


def test_noise_has_the_norm_of_the_update(deltas):
    trained, before = model(), dict(tiny_model().named_parameters())
    with moved(trained, deltas, Direction(1.5, is_random=True), seed=1) as share:
        trained(input_ids=IDS)
        change = {n: w - before[n].detach() for n, w in ffn_weights(trained).items()}
    for name, delta in deltas.items():
        assert change[name].norm().item() == pytest.approx(
            (share() * delta).norm().item(), rel=1e-3
        )
        assert change[name].std() > 0.001


def test_nothing_moves_in_an_evaluation(deltas):
    trained = model().eval()
    with moved(trained, deltas, Direction(1.5), seed=1):
        trained(input_ids=IDS)
        for name, weight in ffn_weights(trained).items():
            assert torch.equal(weight, dict(tiny_model().named_parameters())[name])


def test_the_cosine_of_a_change_with_itself_and_its_opposite(deltas):
    opposite = {name: -delta for name, delta in deltas.items()}
    assert cosine(deltas, deltas) == pytest.approx(1, abs=1e-4)
    assert cosine(deltas, opposite) == pytest.approx(-1, abs=1e-4)
