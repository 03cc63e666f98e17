"""Losses of the first steps, and trained weights, against TRL's own trainer with the same field."""

from dataclasses import replace

import pytest
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from tests.tiny import tiny_tokenizer
from tests.training.conftest import recipe
from tests.training.short_runs import ROWS, SHORT, result
from trans_peft.domain.compute import ComputeSettings
from trans_peft.methods.specs import attach
from trans_peft.training.batches import training_order


def theirs(base, folder, settings, steps, loraplus=None, attention=None, **arguments):
    set_seed(settings.seed)
    loaded = AutoModelForCausalLM.from_pretrained(base, attn_implementation=attention)
    set_seed(settings.seed)
    model = attach(loaded, settings.spec)
    order = training_order([len(row["input_ids"]) for row in ROWS], 2, steps, settings.seed)
    config = SFTConfig(
        **{
            "output_dir": str(folder),
            "max_steps": steps,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 1,
            "per_device_train_batch_size": 2,
            "gradient_checkpointing": False,
        }
        | arguments,
        max_length=512,
        completion_only_loss=True,
        train_sampling_strategy="sequential",
        bf16=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    optimizers = (None, None)
    if loraplus:
        optimizers = (
            create_loraplus_optimizer(
                model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=loraplus, eps=1e-8
            ),
            None,
        )
    return result(
        SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list([ROWS[row] for row in order]),
            processing_class=tiny_tokenizer(),
            optimizers=optimizers,
        )
    )


OPTIMIZERS = {
    "linear": ({"schedule": "linear"}, {"lr_scheduler_type": "linear"}),
    "constant": ({"schedule": "constant"}, {"lr_scheduler_type": "constant_with_warmup"}),
    "warm-up ratio": ({"warmup_steps": 0, "warmup_ratio": 0.5}, {"warmup_steps": 0.5}),
    "epochs": (
        {"steps": None, "epochs": 0.3},
        {"max_steps": -1, "num_train_epochs": 1},
    ),
    "betas": (
        {"betas": (0.5, 0.6), "epsilon": 1e-3, "weight_decay": 0.1},
        {"adam_beta1": 0.5, "adam_beta2": 0.6, "adam_epsilon": 1e-3, "weight_decay": 0.1},
    ),
    "neftune": ({"neftune_alpha": 5.0}, {"neftune_noise_alpha": 5.0}),
    "lora+": ({"loraplus_lr_ratio": 16.0}, {"loraplus": 16.0}),
}
COMPUTE = {
    "checkpointing": (
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True},
    ),
    "eager": ({"attention": "eager"}, {"attention": "eager"}),
}


@pytest.fixture(scope="module")
def plain(tiny_base, tmp_path_factory):
    return theirs(tiny_base, tmp_path_factory.mktemp("plain"), recipe(**SHORT), 4)


SLOW = (
    "linear",
    "constant",
    "warm-up ratio",
    "betas",
    "checkpointing",
    "eager",
)  # a second for each


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if case in SLOW else ())
        for case in (*OPTIMIZERS, *COMPUTE)
    ],
)
def test_a_field_trains_as_in_trl(short_run, tiny_base, tmp_path, plain, case):
    settings = recipe(**SHORT)
    if case in OPTIMIZERS:
        given, arguments = OPTIMIZERS[case]
        settings = recipe(**SHORT | given)
    else:
        given, arguments = COMPUTE[case]
        settings = replace(settings, compute=ComputeSettings(**given))
    steps = 3 if case == "epochs" else 4
    reference = theirs(tiny_base, tmp_path, settings, steps, **arguments)
    found = short_run(settings)
    assert len(found[0]) == steps
    torch.testing.assert_close(found, reference, rtol=2e-4, atol=2e-5)
    if case in OPTIMIZERS:
        weights = found[1]
        unlike = [n for n, p in weights.items() if not torch.allclose(p, plain[1][n], atol=1e-4)]
        assert unlike, "the field changes the training"
