"""The work of a training process, in this process: what needs no processes of its own."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from peft import PeftModel
from peft.utils import load_peft_weights

from tests.tiny import tiny_model
from tests.training.conftest import recipe
from trans_peft.domain.adapter import AdapterSpec
from trans_peft.errors import AdapterError, InvalidSpecError
from trans_peft.training.events import CheckpointSaved, TrainingMetrics, TrainingStarted
from trans_peft.training.finetune import finetune
from trans_peft.training.job import TrainingResult


def trained(job, send=lambda message: None) -> TrainingResult:
    job.check()
    finetune(job, PartialState(cpu=True), send)
    return TrainingResult.read(job.result_file)


def test_a_run_that_died_while_it_saved_needs_no_further_step(make_job, tmp_path):
    job = make_job(tmp_path, recipe(masking_p=0.2, checkpoint_steps=4))

    def keep(message):
        if message == CheckpointSaved(8):
            shutil.copytree(job.checkpoint_folder, tmp_path / "kept")

    first = trained(job, keep)
    assert not job.checkpoint_folder.exists()
    (tmp_path / "kept").rename(job.checkpoint_folder)
    job.result_file.unlink()
    (job.adapter_folder / "adapter_model.safetensors").write_bytes(b"half")
    told = []
    again = trained(job, told.append)
    assert again.weights_sha256 == first.weights_sha256
    assert again.final_loss == first.final_loss
    assert not [message for message in told if isinstance(message, TrainingMetrics)]
    assert [message.step for message in told if isinstance(message, TrainingStarted)] == [8]


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


def test_training_goes_on_from_given_weights_and_says_so_in_its_identity(make_job, tmp_path):
    first = trained(make_job(tmp_path / "first", recipe()))
    still = replace(recipe(steps=1, warmup_steps=0, learning_rate=1e-12))
    job = replace(make_job(tmp_path / "second", still), start=first.folder)
    assert job.identity() != make_job(tmp_path / "third", still).identity()
    again = load_peft_weights(trained(job).folder)
    for key, weight in load_peft_weights(first.folder).items():
        assert torch.allclose(again[key], weight, atol=1e-6)


def test_training_does_not_go_on_from_weights_of_another_kind(make_job, tmp_path):
    first = trained(make_job(tmp_path / "first", recipe(steps=1)))
    other = replace(recipe(), spec=AdapterSpec("LORA", {"r": 8, "target_modules": ["q_proj"]}))
    job = replace(make_job(tmp_path / "second", other), start=first.folder)
    with pytest.raises(AdapterError, match="not those of the recipe's spec"):
        trained(job)


def test_an_adapter_that_cannot_be_built_is_told(make_job, tmp_path):
    spec = AdapterSpec("LORA", {"rank": 4})
    with pytest.raises(InvalidSpecError, match="no option 'rank'"):
        trained(make_job(tmp_path, replace(recipe(), spec=spec)))
