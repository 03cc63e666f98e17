"""Losses of the first steps, and trained weights, against TRL's own trainer with the same field.

The settings of the paper are compared with transformers' trainer, which its authors use.
"""

from dataclasses import replace

import pytest
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from peft.optimizers import create_loraplus_optimizer
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)
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
            "completion_only_loss": True,
        }
        | arguments,
        max_length=512,
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


def of_the_authors(base, folder, settings, rows, **arguments):
    """The loop of gccnlp/Trans-PEFT and LLM-Adapters: transformers' trainer on padded labels."""
    set_seed(settings.seed)
    loaded = AutoModelForCausalLM.from_pretrained(base)
    set_seed(settings.seed)
    model = attach(loaded, settings.spec)
    order = training_order([len(row["input_ids"]) for row in ROWS], 2, 4, settings.seed)
    return result(
        Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(folder),
                max_steps=4,
                learning_rate=1e-2,
                per_device_train_batch_size=2,
                optim="adamw_torch",
                train_sampling_strategy="sequential",
                report_to=[],
                logging_steps=1,
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
                **arguments,
            ),
            train_dataset=Dataset.from_list([rows[row] for row in order]),
            data_collator=DataCollatorForSeq2Seq(tiny_tokenizer(), padding=True),
        )
    )


def labeled(row, *, with_prompt):
    ids, mask = row["input_ids"], row["completion_mask"]
    labels = [
        token if with_prompt or answer else -100 for token, answer in zip(ids, mask, strict=True)
    ]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


PAPER = {
    "commonsense": ({"schedule": "linear", "warmup_steps": 2}, True),
    "math and code": ({"warmup_steps": 0, "warmup_ratio": 0.5}, False),
}


@pytest.mark.parametrize("case", PAPER)
def test_the_papers_schedules_and_losses_are_those_of_its_trainer(
    short_run, tiny_base, tmp_path, case
):
    schedule, with_prompt = PAPER[case]
    settings = replace(recipe(**SHORT | schedule), train_on_prompt=with_prompt)
    rows = [labeled(row, with_prompt=with_prompt) for row in ROWS]
    kind = "linear" if with_prompt else "cosine"
    reference = of_the_authors(
        tiny_base, tmp_path / "theirs", settings, rows, lr_scheduler_type=kind, warmup_steps=2
    )
    found = short_run(settings)
    torch.testing.assert_close(found, reference, rtol=2e-4, atol=2e-5)


def test_the_loss_on_prompts_is_that_of_trl(short_run, tiny_base, tmp_path, plain):
    settings = replace(recipe(**SHORT), train_on_prompt=True)
    reference = theirs(tiny_base, tmp_path / "theirs", settings, 4, completion_only_loss=False)
    found = short_run(settings)
    torch.testing.assert_close(found, reference, rtol=2e-4, atol=2e-5)
    assert abs(found[0][0] - plain[0][0]) > 1e-3, "prompts and answers have other losses"
