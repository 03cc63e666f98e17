"""Runs of a few steps in this process, without child processes and without the adapter's check."""

from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import set_seed

from tests.tiny import tiny_tokenizer
from tests.training.conftest import EXAMPLES
from trans_peft.perturbation import perturbed
from trans_peft.training.compilation import compile_layers
from trans_peft.training.finetune import _fix_order, _trainer
from trans_peft.training.job import TrainingJob
from trans_peft.training.job_rows import JobRows, read_job_rows, token_rows

ROWS = token_rows(EXAMPLES, tiny_tokenizer())
SHORT = {"steps": 4, "warmup_steps": 1}

Result = tuple[list[float], dict[str, torch.Tensor]]
"""The loss of each step, and the trained weights by name."""


def result(trainer) -> Result:
    set_seed(42)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    weights = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return losses, weights


def short_run(job: TrainingJob) -> Result:
    settings = job.recipe
    job = replace(job, recipe=replace(settings, optimizer=settings.optimizer.for_rows(20, 1)))
    Path(job.work_dir).mkdir(exist_ok=True)
    rows = ROWS
    if settings.train_on_prompt:
        rows = read_job_rows(job, tiny_tokenizer(), None).training
    trainer = _trainer(job, JobRows(rows, (), len(rows), []), "cpu")
    _fix_order(trainer, job, 1)
    with perturbed(trainer.model.train(), settings.perturbation, seed=settings.seed):
        if settings.compute.compile:
            compile_layers(trainer.model)
        return result(trainer)
