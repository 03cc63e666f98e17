"""Training with the settings that need a GPU.

The cases marked `slow` train on the device that the machine has. They show that this code works
where there is no GPU; tests/training has faster tests of the same behavior.
"""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from peft.utils import load_peft_weights

from tests.gpu.devices import more_gpu_memory, on_gpu
from tests.training.conftest import recipe
from trans_peft.domain.compute import ComputeSettings
from trans_peft.training.events import CheckpointSaved, TrainingMetrics, TrainingStarted
from trans_peft.training.finetune import finetune
from trans_peft.training.job import TrainingResult
from trans_peft.training.worker import _failure

SLOW = [pytest.mark.slow]  # tens of seconds on a CPU
CHECKPOINTED = ComputeSettings(gradient_checkpointing=True)


def trained(job, send=lambda message: None) -> TrainingResult:
    """Train on the GPU if there is one."""
    job.check()
    finetune(job, PartialState(cpu=not torch.cuda.is_available()), send)
    return TrainingResult.read(job.result_file)


def losses(job) -> list[float]:
    found = []
    trained(job, lambda m: found.append(m.loss) if isinstance(m, TrainingMetrics) else None)
    return found


LEARNS = {
    "bfloat16, checkpointing": ({"dtype": "bfloat16", "compute": CHECKPOINTED}, SLOW),
    "QLoRA": ({"dtype": "nf4"}, on_gpu("bitsandbytes")),
    "QLoRA, checkpointing": ({"dtype": "nf4", "compute": CHECKPOINTED}, on_gpu("bitsandbytes")),
    "paged 8 bits": ({"dtype": "bfloat16", "name": "paged_adamw_8bit"}, on_gpu("bitsandbytes")),
}


@pytest.mark.parametrize(
    "change", [pytest.param(change, marks=marks, id=k) for k, (change, marks) in LEARNS.items()]
)
def test_the_adapter_learns_in_float32(wide_job, change):
    change = dict(change)
    optimizer = {"name": change.pop("name")} if "name" in change else {}
    settings = replace(
        recipe(masking_p=0.1, dropping_p=0.1, steps=15, max_length=96, **optimizer), **change
    )
    job = wide_job("learns", settings)
    found = losses(job)
    assert math.isfinite(found[-1])
    assert found[-1] < found[0] - 0.1
    dtypes = {tensor.dtype for tensor in load_peft_weights(job.adapter_folder, "cpu").values()}
    assert dtypes == {torch.float32}


COMPUTE = {
    "eager": ({"attention": "eager"}, SLOW),
    "flash attention": ({"attention": "flash_attention_2"}, on_gpu("flash_attn")),
    "flex attention": ({"attention": "flex_attention"}, on_gpu()),
    "liger": ({"liger": True}, on_gpu("liger_kernel")),
    "compile": ({"compile": True}, on_gpu()),
}


@pytest.mark.timeout(600)  # compilation
@pytest.mark.parametrize("packing", [False, pytest.param(True, marks=on_gpu())], ids=str)
@pytest.mark.parametrize(
    "compute", [pytest.param(change, marks=marks, id=k) for k, (change, marks) in COMPUTE.items()]
)
def test_a_compute_setting_changes_losses_by_rounding_only(wide_job, compute, packing):
    """In bfloat16. `sdpa` without kernels and compilation is the reference."""
    settings = replace(
        recipe(masking_p=0.2, dropping_p=0.2, steps=3, warmup_steps=0, max_length=96),
        dtype="bfloat16",
        packing=packing,
        compute=ComputeSettings(attention="sdpa"),
    )
    expected = losses(wide_job("reference", settings))
    changed = replace(settings, compute=replace(settings.compute, **compute))
    assert losses(wide_job("changed", changed)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, marks=SLOW, id="float32"),
        pytest.param({"dtype": "nf4"}, marks=on_gpu("bitsandbytes"), id="QLoRA"),
    ],
)
def test_a_resumed_run_ends_in_the_same_weights(wide_job, tmp_path, change):
    """Kernels for GPUs may add in another order at each run, so the weights are nearly the same."""
    settings = recipe(dropout=0.1, masking_p=0.2, dropping_p=0.2, steps=4, checkpoint_steps=2)
    job = wide_job("resumed", replace(settings, **change))
    kept = tmp_path / "kept"

    def keep(message):
        if message == CheckpointSaved(2):
            shutil.copytree(job.checkpoint_folder, kept)

    trained(job, keep)
    expected = load_peft_weights(job.adapter_folder, "cpu")
    job.result_file.unlink()
    kept.rename(job.checkpoint_folder)
    started = []
    trained(job, lambda m: started.append(m.step) if isinstance(m, TrainingStarted) else None)
    assert started == [2]
    found = load_peft_weights(job.adapter_folder, "cpu")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_a_training_that_does_not_fit_reports_that_memory_ran_out(wide_job):
    job = wide_job("large", recipe(steps=1, warmup_steps=0, batch_size=2048, max_length=96))
    with more_gpu_memory(256 * 2**20), pytest.raises(torch.OutOfMemoryError) as caught:
        trained(job)
    assert _failure(caught.value).error == "OutOfMemoryError"
