"""A training on a sharded base has the losses and the weights of an unsharded one."""

import multiprocessing
import os
import socket
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_model
from tests.training.conftest import recipe
from tests.training.short_runs import SHORT
from tests.training.test_fit import HELD_OUT, TWO_PROCESSES, trained_by_a_plain_loop
from tests.training.test_trainer import restated
from trans_peft.data import write_examples
from trans_peft.domain.adapter import AdapterSpec
from trans_peft.domain.compute import ComputeSettings
from trans_peft.domain.recipe import Perturbation
from trans_peft.errors import InvalidSpecError, TrainingCancelled
from trans_peft.methods.specs import attach
from trans_peft.training.events import TrainingMetrics
from trans_peft.training.finetune import finetune
from trans_peft.training.job import TrainingResult
from trans_peft.training.parent_watch import stop_requested
from trans_peft.training.sharding import shard_base

SHARDED = ComputeSettings(sharding=True)
TWO = recipe(processes=2, masking_p=0.3, dropping_p=0.3, **SHORT)
DORA = AdapterSpec("LORA", {"r": 2, "target_modules": ["v_proj", "up_proj"], "use_dora": True})
CASES = {
    "neuron": TWO,
    "element, checkpointing": replace(
        TWO,
        perturbation=Perturbation(0.3, 0.3, "element"),
        compute=ComputeSettings(gradient_checkpointing=True),
    ),
    "dora, bfloat16": replace(TWO, spec=DORA, dtype="bfloat16"),
    "bottleneck": replace(TWO, spec=AdapterSpec("BOTTLENECK", {})),
}


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone: weights are gathered, from one shard each."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "case",
    [name if name == "neuron" else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_sharding_changes_no_draw_loss_or_weight(short_run, group, case):
    settings = CASES[case]
    expected = short_run(settings)
    compute = replace(settings.compute, sharding=True)
    found = short_run(replace(settings, compute=compute))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


NOT_SHARDED = {
    "at least 2 processes": {"processes": 1},
    "the dtype float32 or bfloat16": {"dtype": "nf4"},
    "objective: sft": {"objective": "dpo"},
    "compute.compile: false": {"compute": ComputeSettings(sharding=True, compile=True)},
}


@pytest.mark.parametrize("need", NOT_SHARDED)
def test_what_cannot_be_sharded_is_refused(need):
    sharded = replace(TWO, compute=SHARDED)
    with pytest.raises(InvalidSpecError, match=f"compute.sharding needs {need}"):
        replace(sharded, **NOT_SHARDED[need])


def train(job, *, stop_after=None):
    """Train in two processes, and return the result."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")  # a fork would have the group of other tests
    processes = [
        context.Process(target=work, args=(job, rank, port, stop_after)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return TrainingResult.read(job.result_file) if stop_after is None else None


def work(job, rank, port, stop_after):
    """What `worker` does. Stops as after SIGTERM, with a checkpoint of the step `stop_after`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def send(event):
        if isinstance(event, TrainingMetrics) and event.step == stop_after:
            stop_requested.set()

    job.work_dir.mkdir(exist_ok=True)
    with pytest.raises(TrainingCancelled) if stop_after else nullcontext():
        finetune(job, PartialState(cpu=True), send)
    PartialState().wait_for_everyone()


@pytest.mark.slow  # three trainings, and the plain loop
@pytest.mark.timeout(900)
def test_two_processes_resume_to_the_same_weights_which_are_those_of_a_plain_loop(
    make_job, tiny_base, tmp_path
):
    """The reference is one process without accelerate, TRL, DDP or FSDP."""
    compute = replace(TWO_PROCESSES.compute, sharding=True)
    job = make_job(tmp_path / "work", replace(TWO_PROCESSES, compute=compute))
    job = replace(job, validation_file=write_examples(HELD_OUT, tmp_path / "held-out.jsonl"))
    whole = train(job)
    again = replace(job, work_dir=tmp_path / "again")
    train(again, stop_after=5)
    resumed = train(again)
    assert resumed.weights_sha256 == whole.weights_sha256
    assert resumed.validation_loss == whole.validation_loss

    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    stock = PeftModel.from_pretrained(base, whole.folder).eval()
    plain, ids = trained_by_a_plain_loop(), torch.arange(40)[None]
    torch.testing.assert_close(stock(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        expected = restated(plain, HELD_OUT).item()
    assert whole.validation_loss == pytest.approx(expected, rel=1e-4)


def test_only_frozen_weights_are_sharded(group):
    model = attach(tiny_model(), TWO.spec)
    shard_base(model, init_device_mesh("cpu", (1,)), "cpu")
    for name, weight in model.named_parameters():
        assert isinstance(weight, DTensor) != weight.requires_grad, name
    ids = torch.arange(5)[None]
    expected = attach(tiny_model(), TWO.spec)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected)
