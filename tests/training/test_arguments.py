"""The optimizer's groups of LoRA+, against PEFT's function and a table of rates."""

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from tests.tiny import tiny_model
from tests.training.conftest import recipe
from trans_peft.domain.adapter import AdapterSpec
from trans_peft.methods.specs import attach
from trans_peft.training.arguments import loraplus_optimizer, training_arguments
from trans_peft.training.job import TrainingJob

RATE, RATIO, DECAY = 1e-3, 8.0, 0.1
PLAIN = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def model_and_optimizer(tmp_path, options):
    settings = recipe(learning_rate=RATE, weight_decay=DECAY)
    job = TrainingJob(settings, tmp_path, "tiny", "", tmp_path / "rows.jsonl", tmp_path)
    model = attach(tiny_model(), AdapterSpec("LORA", options))
    return model, loraplus_optimizer(model, training_arguments(job), RATIO)


def groups(model, optimizer):
    names = {id(weight): name for name, weight in model.named_parameters()}
    return [
        (sorted(names[id(p)] for p in group["params"]), group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("options", [PLAIN, PLAIN | {"lora_bias": True}], ids=["plain", "bias"])
def test_the_groups_of_lora_are_those_of_peft(tmp_path, options):
    model, optimizer = model_and_optimizer(tmp_path, options)
    reference = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, loraplus_weight_decay=DECAY
    )
    assert groups(model, optimizer) == groups(model, reference)


@pytest.mark.parametrize(
    ("options", "others"),
    [
        (PLAIN | {"use_dora": True}, "lora_magnitude_vector"),
        (PLAIN | {"modules_to_save": ["norm"]}, "norm.modules_to_save"),
        (PLAIN | {"use_dora": True, "modules_to_save": ["norm"]}, "norm.modules_to_save"),
    ],
    ids=["dora", "norm", "dora and norm"],
)
def test_only_the_weights_of_b_have_its_rate(tmp_path, options, others):
    model, optimizer = model_and_optimizer(tmp_path, options)
    found = groups(model, optimizer)
    rates = {name: rate for names, rate, _ in found for name in names}
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert sorted(name for names, *_ in found for name in names) == sorted(trained)
    assert rates == {name: RATE * (RATIO if "lora_B" in name else 1) for name in trained}
    assert any(others in name for name in trained)


def test_a_step_of_dora_updates_every_weight_at_its_rate(tmp_path):
    """The first step of AdamW changes a weight by its rate times the sign of its gradient."""
    model, optimizer = model_and_optimizer(tmp_path, PLAIN | {"use_dora": True})
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
        for weight in group["params"]:
            weight.grad = torch.ones_like(weight)
    optimizer.step()
    for name, weight in model.named_parameters():
        if name in before:
            rate = RATE * (RATIO if "lora_B" in name else 1)
            torch.testing.assert_close(before[name] - weight, torch.full_like(weight, rate))
