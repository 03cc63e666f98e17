"""DP-SGD: gradients against Opacus and a restated formula, and the noise against accountants."""

import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from opacus.accountants import create_accountant
from opacus.optimizers import DPOptimizer

from tests.tiny import tiny_tokenizer
from tests.training.conftest import recipe
from tests.training.short_runs import result
from trans_peft.data import Example, write_examples
from trans_peft.domain.privacy import PrivacySettings
from trans_peft.errors import InvalidSpecError
from trans_peft.training import finetune as finetune_module
from trans_peft.training.dp_sgd import DpSgd, noise_multiplier
from trans_peft.training.events import CheckpointSaved, TrainingMetrics
from trans_peft.training.finetune import _trainer, finetune
from trans_peft.training.job import TrainingJob, TrainingResult
from trans_peft.training.job_rows import read_job_rows

KEY = "5e" * 16
ROWS = tuple(Example(str(i), f"What is {i}? " * (1 + i % 3), f"It is {i}.") for i in range(8))
EVERY_ROW = DpSgd(noise_multiplier=0.0, clip=1e9, batch_size=8, sampling_rate=1.0, key=KEY)
SOME_ROWS = DpSgd(noise_multiplier=0.7, clip=0.5, batch_size=4, sampling_rate=0.5, key=KEY)


@pytest.fixture(autouse=True)
def _without_the_check(monkeypatch):
    monkeypatch.setattr(finetune_module, "check_adapter_is_trainable", lambda *_: None)


@pytest.fixture
def job(make_job, tmp_path):
    """Return a function that makes a job with micro-steps of one row."""

    def make(dp_sgd, *, name="private", rows=ROWS, **fields):
        settings = {"steps": 3, "warmup_steps": 1, "max_grad_norm": 0.0} | fields
        if dp_sgd is not None:
            settings |= {"batch_size": 1, "gradient_accumulation": dp_sgd.batch_size}
        data = write_examples(rows, tmp_path / f"{name}.jsonl")
        made = make_job(tmp_path / name, recipe(**settings))
        return replace(made, data_file=data, dp_sgd=dp_sgd)

    return make


def trainer_of(job):
    job.check()
    return _trainer(job, read_job_rows(job, tiny_tokenizer(), None), "cpu")


def test_without_noise_and_clipping_it_is_ordinary_training(job):
    """All rows have answers of one length, so the means over rows and over tokens are equal."""
    trainer = trainer_of(job(None, name="ordinary", batch_size=8))
    trainer.train_dataset = trainer.train_dataset.select([*range(8)] * 3)
    expected = result(trainer)
    found = result(trainer_of(job(EVERY_ROW)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def single_gradients(trainer, rows):
    """The gradient of each row's loss, by autograd on the model alone."""
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    found = []
    for row in rows:
        labels = torch.tensor([row["labels"]])
        logits = trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
        found.append(torch.autograd.grad(loss, weights))
    return weights, found


def test_a_step_clips_each_row_and_adds_noise_once(job):
    trainer = trainer_of(job(SOME_ROWS, learning_rate=1e-2))
    trainer.model.train()
    with torch.no_grad():  # B is 0 at first, and so is the gradient of A
        for name, weight in trainer.model.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.5)
    trainer.state.global_step = 1
    trainer.current_gradient_accumulation_steps = 1
    drawn = trainer.train_dataset[1]
    assert 0 < len(drawn["rows"]) < len(ROWS)
    trainer.training_step(trainer.model, trainer.data_collator([drawn]))
    weights, single = single_gradients(trainer, [trainer._rows[row] for row in drawn["rows"]])
    ours = [weight.grad.clone() for weight in weights]

    norms = [torch.sqrt(sum((g**2).sum() for g in row)).item() for row in single]
    assert max(norms) > 0.5, "clipping has no effect"
    generator = np.random.default_rng([int(KEY, 16), 2])
    for number, gradient in enumerate(ours):
        clipped = sum(min(1, 0.5 / n) * row[number] for n, row in zip(norms, single, strict=True))
        noise = generator.standard_normal(gradient.numel(), dtype=np.float32) * 0.7 * 0.5
        expected = (clipped + torch.from_numpy(noise).view_as(gradient)) / 4
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)

    silent = trainer_of(job(replace(SOME_ROWS, noise_multiplier=0.0), name="silent"))
    silent.model.load_state_dict(trainer.model.state_dict())
    silent.model.train()
    silent.current_gradient_accumulation_steps = 1
    silent.training_step(silent.model, silent.data_collator([drawn]))
    own = [weight for weight in silent.model.parameters() if weight.requires_grad]
    opacus = DPOptimizer(
        torch.optim.SGD(weights, lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        expected_batch_size=4,
    )
    for weight, gradients in zip(weights, zip(*single, strict=True), strict=True):
        weight.grad_sample = torch.stack(gradients)
    opacus.pre_step()
    for weight, other in zip(own, weights, strict=True):
        torch.testing.assert_close(weight.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_random_numbers_of_a_row_do_not_depend_on_other_rows(job):
    """With numbers from one public seed, a row would change the dropout of the rows after it, and
    the sum by more than `clip`."""
    trainer = trainer_of(job(replace(SOME_ROWS, noise_multiplier=0.0, clip=1e9), dropout=0.5))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    with torch.no_grad():
        for weight in weights:
            weight.fill_(0.1)

    def gradients(*rows):
        trainer.model.zero_grad()
        torch.manual_seed(1)
        trainer.training_step(trainer.model, trainer.data_collator([{"rows": [*rows]}]))
        return torch.cat([weight.grad.flatten() for weight in weights])

    second = gradients(6)
    torch.testing.assert_close(gradients(1, 6), gradients(1) + second)
    trainer._dp_sgd = replace(trainer._dp_sgd, key="00" * 16)
    assert not torch.allclose(second, gradients(6)), "they could be computed from the recipe"
    trainer._dp_sgd, trainer.state.global_step = replace(trainer._dp_sgd, key=KEY), 1
    assert not torch.allclose(second, gradients(6)), "all steps have the same"


def test_a_step_without_rows_has_the_gradient_of_the_noise(job):
    trainer = trainer_of(job(replace(SOME_ROWS, sampling_rate=0.0)))
    assert trainer.tokens_per_step == [0, 0, 0]
    losses, weights = result(trainer)
    assert losses == [0.0] * 3
    assert any(weight.abs().sum() > 0 for name, weight in weights.items() if "lora_B" in name)


def test_rows_and_noise_are_drawn_from_the_key_and_the_step():
    dp_sgd = DpSgd(noise_multiplier=1.5, clip=2.0, batch_size=25, sampling_rate=0.25, key=KEY)
    steps = dp_sgd.rows_of_steps(100, 400)
    sizes = np.array([len(rows) for rows in steps])
    assert sizes.mean() == pytest.approx(25, abs=4 * np.sqrt(100 * 0.25 * 0.75 / 400))
    assert sizes.var() == pytest.approx(18.75, rel=0.3)  # binomial, not constant
    counts = np.bincount([row for rows in steps for row in rows], minlength=100)
    assert np.all(np.abs(counts - 100) < 5 * np.sqrt(400 * 0.25 * 0.75))
    (noise, other) = dp_sgd.noise(1, [10_000, 10_000])
    assert noise.std() == pytest.approx(3.0, rel=0.03)
    assert abs(noise.mean()) < 4 * 3.0 / 100
    assert abs(np.corrcoef(noise, other)[0, 1]) < 0.05
    assert np.array_equal(noise, dp_sgd.noise(1, [10_000])[0])
    for changed in (dp_sgd.noise(2, [10_000]), replace(dp_sgd, key="00" * 16).noise(1, [10_000])):
        assert abs(np.corrcoef(noise, changed[0])[0, 1]) < 0.05
    assert KEY not in repr(dp_sgd)


@pytest.mark.parametrize(("epsilon", "batch", "steps"), [(1.0, 250, 60), (8.0, 1000, 20)])
def test_the_noise_is_the_least_that_the_accountants_allow(epsilon, batch, steps):
    """The RDP accountant (Mironov et al. 2019) is a second, looser bound."""
    settings = PrivacySettings(epsilon, delta=1e-5, batch_size=batch)
    noise = noise_multiplier(settings, 1000, steps)
    spent = {}
    for kind in ("prv", "rdp"):
        accountant = create_accountant(kind)
        accountant.history = [(noise, batch / 1000, steps)]
        with np.errstate(divide="ignore"):
            spent[kind] = accountant.get_epsilon(delta=1e-5)
    assert 0.96 * epsilon < spent["prv"] <= epsilon
    assert spent["prv"] < spent["rdp"] < 1.15 * epsilon
    made = DpSgd.meeting(settings, 1000, steps, KEY)
    assert made == DpSgd(noise, 1.0, batch, batch / 1000, KEY)


@pytest.mark.parametrize(
    ("fields", "rows", "problem"),
    [
        ({"delta": 1e-3}, 1000, r"delta=0.001 must be less than 1 / rows = 0.001"),
        ({"delta": 1e-3}, 2000, r"delta=0.001 must be less than 1 / rows = 0.0005"),
        ({}, 255, "batch_size=256 must be at most the 255 rows"),
    ],
)
def test_rows_that_are_too_few_for_the_settings_are_refused(fields, rows, problem):
    with pytest.raises(InvalidSpecError, match=problem):
        noise_multiplier(PrivacySettings(8.0, **fields), rows, 10)


def test_a_budget_that_no_noise_meets_is_refused(monkeypatch):
    from opacus.accountants import utils

    monkeypatch.setattr(utils, "MAX_SIGMA", 15)
    with pytest.raises(InvalidSpecError, match=r"no noise gives epsilon=5 and delta=1e-05 in 9 st"):
        noise_multiplier(PrivacySettings(5, batch_size=500), 1000, 9)


def test_without_opacus_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.accountants.utils", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[privacy\]'"):
        noise_multiplier(PrivacySettings(2.5), 1000, 10)


def trained(job, send=lambda message: None):
    job.check()
    finetune(job, PartialState(cpu=True), send)
    return TrainingResult.read(job.result_file)


def test_a_run_resumes_to_the_same_weights(job):
    made = job(SOME_ROWS, dropout=0.1, steps=4, checkpoint_steps=2)
    losses: dict[str, list[float]] = {"first": [], "again": []}

    def keep(message, run="first"):
        if message == CheckpointSaved(2) and run == "first":
            shutil.copytree(made.checkpoint_folder, made.work_dir / "kept")
        if isinstance(message, TrainingMetrics):
            losses[run].append(message.loss)

    first = trained(made, keep)
    (made.work_dir / "kept").rename(made.checkpoint_folder)
    made.result_file.unlink()
    again = trained(made, lambda message: keep(message, "again"))
    assert again.weights_sha256 == first.weights_sha256
    assert losses["again"] == losses["first"][2:]
    assert first.epochs == 4 * 4 / 8


def canary(number):
    return Example(
        f"canary {number}",
        "What is it? ",
        f"{np.random.default_rng(number).integers(10**7, 10**8)}",
    )


def test_a_canary_is_learned_without_noise_and_not_with_it(job):
    """Its rank among random others (Carlini et al. 2019). With epsilon 1 it is the first of 41 with
    a probability of at most e / 41 + delta."""
    private = DpSgd.meeting(PrivacySettings(1.0, batch_size=4), 4, 30, KEY)
    ranks = {}
    for name, dp_sgd in ("plain", replace(EVERY_ROW, batch_size=4)), ("private", private):
        settings = {"steps": 30, "learning_rate": 3e-2}
        trainer = trainer_of(job(dp_sgd, name=name, rows=[*ROWS[:3], canary(0)], **settings))
        trainer.train()
        others = job(None, name=f"{name} others", rows=[*map(canary, range(41))])
        rows = read_job_rows(others, tiny_tokenizer(), None).training
        ids = torch.tensor([row["input_ids"] for row in rows])
        with torch.no_grad():
            log_p = trainer.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        losses = -log_p.gather(2, ids[:, 1:, None]).sum(dim=(1, 2))  # the prompts are equal
        ranks[name] = int((losses < losses[0]).sum())
    assert ranks["plain"] == 0 < ranks["private"]


def test_a_key_is_part_of_the_identity_and_a_job_reads_back_equal(job):
    made = job(SOME_ROWS)
    made.check()
    assert TrainingJob.read(made.write()) == made
    assert made.write().stat().st_mode & 0o077 == 0, "the file contains the key"
    other = replace(made, dp_sgd=replace(SOME_ROWS, key="00" * 16))
    assert len({j.identity() for j in (made, other, replace(made, dp_sgd=None))}) == 3


@pytest.mark.parametrize(
    "fields", [{"processes": 2}, {"packing": True}, {"objective": "dpo"}, {"train_on_prompt": True}]
)
def test_a_job_whose_steps_are_not_of_single_rows_is_refused(job, fields):
    made = job(SOME_ROWS)
    with pytest.raises(InvalidSpecError, match="micro-steps of one row"):
        replace(made, recipe=replace(made.recipe, **fields)).check()
    batches = replace(made.recipe.optimizer, batch_size=2)
    with pytest.raises(InvalidSpecError, match="micro-steps of one row"):
        replace(made, recipe=replace(made.recipe, optimizer=batches)).check()
