"""Validation during training: the loss against a restatement, and runs that stop or are killed."""

import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from peft.utils import load_peft_weights

from tests.training.conftest import EXAMPLES, recipe
from tests.training.short_runs import ROWS
from tests.training.test_finetune import trained
from tests.training.test_trainer import restated, trainer
from trans_peft.data import write_examples
from trans_peft.domain.data import DataSource
from trans_peft.domain.validation import ValidationSettings
from trans_peft.errors import InvalidSpecError, TrainingError
from trans_peft.training import finetune as finetune_module
from trans_peft.training import held_out
from trans_peft.training.events import CheckpointSaved, TrainingMetrics, ValidationMetrics
from trans_peft.training.finetune import finetune
from trans_peft.training.held_out import held_out_loss

LOSSES = {1: 5.0, 2: 4.0, 3: 3.0, 4: 6.0, 5: 3.0, 6: 7.0}


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    monkeypatch.setattr(finetune_module, "check_adapter_is_trainable", lambda *_: None)


@pytest.fixture
def validated(make_job, tmp_path):
    """Return a function that makes a job with held-out rows."""
    file = write_examples(EXAMPLES[:7], tmp_path / "validation.jsonl")

    def make(name, **settings):
        settings = ValidationSettings(**{"share": 0.2, "every_steps": 1} | settings)
        wanted = replace(
            recipe(dropout=0.1, masking_p=0.2, checkpoint_steps=2), validation=settings
        )
        return replace(make_job(tmp_path / name, wanted), validation_file=file)

    return make


@pytest.mark.parametrize("settings", [{}, {"packing": True}], ids=["padded", "packed"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_loss_is_the_mean_over_all_answer_tokens(tmp_path, settings, batch_size):
    ours = trainer(tmp_path, per_device_eval_batch_size=batch_size, **settings)
    ours.model.train()
    state = torch.get_rng_state()
    loss = held_out_loss(ours, ROWS[:6])
    assert torch.equal(torch.get_rng_state(), state)
    assert ours.model.training
    with torch.no_grad():
        expected = restated(ours.model.eval(), EXAMPLES[:6])
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_validation_changes_no_weight_of_the_last_step(make_job, validated, tmp_path):
    job = validated("validated", keep="last", every_steps=3)
    sent = []
    found = trained(job, sent.append)
    plain = trained(make_job(tmp_path / "plain", replace(job.recipe, validation=None)))
    assert found.weights_sha256 == plain.weights_sha256
    evaluations = [event for event in sent if isinstance(event, ValidationMetrics)]
    assert [event.step for event in evaluations] == [3, 6, 8]
    assert evaluations[-1].metrics == {"validation_loss": found.validation_loss}
    assert (found.kept_step, found.steps) == (8, 8)
    assert (plain.kept_step, plain.validation_loss) == (None, None)


class Killed(BaseException):
    """Not caught by anything, like a signal."""


@pytest.mark.parametrize(
    ("when", "on_another_host"),
    [
        pytest.param("after a checkpoint", False, marks=pytest.mark.slow),  # as long as the others
        pytest.param("after a checkpoint", True, marks=pytest.mark.slow),
        ("after the step that ends the run", False),
    ],
)
def test_a_killed_run_stops_at_the_same_step_with_the_same_best_weights(
    validated, monkeypatch, when, on_another_host
):
    """The other host has the checkpoint, and nothing else of the work folder.

    Step 6 is the third without a lower loss, and a step of which a checkpoint would be saved.
    """
    weights = {}

    def loss_of_step(trainer, rows):
        step = trainer.state.global_step
        named = trainer.model.named_parameters()
        weights[step] = {n: p.detach().clone() for n, p in named if "lora_" in n}
        return LOSSES[step]

    monkeypatch.setattr(held_out, "held_out_loss", loss_of_step)
    job = validated("killed", stop_after=3)

    def kill(message):
        stops = (
            message == CheckpointSaved(4)
            if when == "after a checkpoint"
            else message == ValidationMetrics(6, 7.0, 3)
        )
        if stops:
            raise Killed

    job.check()
    with pytest.raises(Killed):
        finetune(job, PartialState(cpu=True), kill)
    first, weights = dict(weights), {}
    if on_another_host:
        shutil.rmtree(job.work_dir / "best")
    sent = []
    result = trained(job, sent.append)
    assert [e.step for e in sent if isinstance(e, TrainingMetrics)] == [5, 6]
    assert (result.steps, result.kept_step, result.validation_loss) == (6, 3, 3.0)
    saved = load_peft_weights(result.folder)
    assert len(saved) == len(first[3]) == 12
    for name, tensor in saved.items():
        expected = first[3][name.replace(".weight", ".default.weight")]
        assert torch.equal(tensor, expected)
        assert not torch.equal(tensor, first[4][name.replace(".weight", ".default.weight")])
    assert not (job.work_dir / "best").exists()


def test_a_validation_loss_that_is_not_finite_ends_the_run(validated, monkeypatch):
    monkeypatch.setattr(held_out, "held_out_loss", lambda *_: float("nan"))
    with pytest.raises(TrainingError, match="validation rows is nan after step 1"):
        trained(validated("nan"))


def test_a_run_that_cannot_be_stopped_is_refused_before_a_base_is_loaded(validated, monkeypatch):
    monkeypatch.setattr(finetune_module, "load_base", lambda *_, **__: pytest.fail("loaded"))
    job = validated("short")
    settings = replace(
        recipe(steps=None, epochs=0.4),  # 4 steps of 2 rows
        validation=ValidationSettings(share=0.2, every_steps=1, stop_after=3),
    )
    with pytest.raises(InvalidSpecError, match="before step 4, and the run has 4 steps"):
        trained(replace(job, recipe=settings))


def test_validation_rows_and_settings_belong_together(make_job, validated, tmp_path):
    job = validated("one")
    for odd in (replace(job, validation_file=None), replace(job, recipe=recipe())):
        with pytest.raises(InvalidSpecError, match="only one of them is given"):
            odd.check()
    assert job.identity() != replace(job, validation_file=job.data_file).identity()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give either data, .* or share"),
        ({"share": 0.1, "data": DataSource("v.jsonl")}, "give either data, .* or share"),
        ({"share": 0.6}, r"share must lie in \[0, 0.5\], not 0.6"),
        ({"share": 0.1, "every_steps": 0}, "every_steps must be a whole number from 1"),
        ({"share": 0.1, "stop_after": -1}, "stop_after must be a whole number from 0"),
        ({"share": 0.1, "keep": "first"}, "keep must be one of best, last"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(InvalidSpecError, match=message):
        ValidationSettings(**settings)
