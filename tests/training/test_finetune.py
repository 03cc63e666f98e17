"""The work of a training process, without child processes."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from peft import PeftModel
from peft.utils import load_peft_weights
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.tiny import tiny_model
from tests.training.conftest import recipe
from trans_peft.domain.adapter import AdapterSpec
from trans_peft.errors import AdapterError, InvalidSpecError, TrainingError
from trans_peft.training import finetune as finetune_module
from trans_peft.training.events import CheckpointSaved, TrainingMetrics, TrainingStarted
from trans_peft.training.finetune import finetune
from trans_peft.training.job import TrainingResult


def trained(job, send=lambda message: None) -> TrainingResult:
    job.check()
    finetune(job, PartialState(cpu=True), send)
    return TrainingResult.read(job.result_file)


def test_a_run_that_was_killed_while_saving_needs_no_further_step(make_job, tmp_path):
    job = make_job(tmp_path, recipe(masking_p=0.2, checkpoint_steps=4))

    def keep(message):
        if message == CheckpointSaved(8):
            shutil.copytree(job.checkpoint_folder, tmp_path / "kept")

    first = trained(job, keep)
    assert not job.checkpoint_folder.exists()
    (tmp_path / "kept").rename(job.checkpoint_folder)
    mark = job.checkpoint_folder / "checkpoint-8" / "device_seconds"
    assert 0 < float(mark.read_text()) <= first.device_seconds
    mark.write_text("1000")
    job.result_file.unlink()
    (job.adapter_folder / "adapter_model.safetensors").write_bytes(b"half")
    sent = []
    again = trained(job, sent.append)
    assert again.weights_sha256 == first.weights_sha256
    assert again.final_loss == first.final_loss
    assert 1000 < again.device_seconds < 1100
    assert again.tags["device_seconds"] == f"{again.device_seconds:.1f}"
    assert not [message for message in sent if isinstance(message, TrainingMetrics)]
    assert [message.step for message in sent if isinstance(message, TrainingStarted)] == [8]


@pytest.mark.parametrize(
    "change",
    [
        {"packing": True},
        {"dtype": "bfloat16"},
        pytest.param({"dtype": "nf4"}, marks=pytest.mark.quantized),
        {"spec": AdapterSpec("LORA", {"use_dora": True})},
    ],
    ids=str,
)
def test_every_kind_of_recipe_learns(make_job, tmp_path, change):
    job = make_job(tmp_path, replace(recipe(dropping_p=0.1, steps=30, max_length=96), **change))
    losses = []
    result = trained(
        job, lambda m: losses.append(m.loss) if isinstance(m, TrainingMetrics) else None
    )
    assert result.final_loss < losses[0] - 0.1
    assert math.isfinite(result.final_loss)
    assert {t.dtype for t in load_peft_weights(result.folder).values()} == {torch.float32}
    stock = PeftModel.from_pretrained(tiny_model(), result.folder)
    ids = torch.arange(20)[None]
    assert not torch.equal(stock(ids).logits, tiny_model()(ids).logits)


def test_training_starts_from_given_weights_and_has_its_own_identity(make_job, tmp_path):
    first = trained(make_job(tmp_path / "first", recipe()))
    still = replace(recipe(steps=1, warmup_steps=0, learning_rate=1e-12))
    job = replace(make_job(tmp_path / "second", still), start=first.folder)
    assert job.identity() != make_job(tmp_path / "third", still).identity()
    again = load_peft_weights(trained(job).folder)
    for key, weight in load_peft_weights(first.folder).items():
        assert torch.allclose(again[key], weight, atol=1e-6)


def test_training_does_not_start_from_weights_of_another_spec(make_job, tmp_path):
    first = trained(make_job(tmp_path / "first", recipe(steps=1, warmup_steps=0)))
    other = replace(recipe(), spec=AdapterSpec("LORA", {"r": 8, "target_modules": ["q_proj"]}))
    job = replace(make_job(tmp_path / "second", other), start=first.folder)
    with pytest.raises(AdapterError, match="do not match the recipe's spec"):
        trained(job)


def test_an_adapter_that_cannot_be_built_is_refused(make_job, tmp_path):
    spec = AdapterSpec("LORA", {"rank": 4})
    with pytest.raises(InvalidSpecError, match="no option 'rank'"):
        trained(make_job(tmp_path, replace(recipe(), spec=spec)))


def test_a_weight_that_is_not_finite_after_the_last_step_ends_the_run(make_job, tmp_path):
    """The loss is computed before the update, so the loss of the last step is finite."""
    job = make_job(tmp_path, recipe(steps=1, warmup_steps=0))

    def break_weights(optimizer, *_):
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].fill_(math.inf)

    handle = register_optimizer_step_post_hook(break_weights)
    try:
        with pytest.raises(TrainingError, match=r"not finite after step 1(.|\n)*lora_"):
            trained(job)
    finally:
        handle.remove()
    assert not job.adapter_folder.exists()
    assert not job.result_file.exists()


def test_a_recipe_that_trl_rejects_is_an_error_of_the_spec(make_job, tmp_path, monkeypatch):
    def reject(**_):
        raise ValueError("TRL does not support this")

    monkeypatch.setattr(finetune_module, "AnswerTrainer", reject)
    with pytest.raises(InvalidSpecError, match=r"TRL rejects(.|\n)*does not support this"):
        trained(make_job(tmp_path, recipe()))


def test_a_step_that_drops_every_module_of_the_adapter_trains_on(make_job, tmp_path):
    options = {"target_modules": ["q_proj", "v_proj"], "module_dropout": 0.9}
    job = make_job(tmp_path, replace(recipe(), spec=AdapterSpec("LOHA", options)))
    assert math.isfinite(trained(job).final_loss)
