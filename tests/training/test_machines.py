"""Several machines: what the environment says, and what each machine starts."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.training.conftest import recipe
from tests.training.test_finetune import trained
from tests.training.test_fit import HELD_OUT, TWO_PROCESSES
from trans_peft.data import write_examples
from trans_peft.errors import InvalidSpecError, TrainingError
from trans_peft.training import finetune as finetune_module
from trans_peft.training import join, launch
from trans_peft.training.machines import Machines

SECOND = {
    "TRANS_PEFT_MACHINES": "2",
    "TRANS_PEFT_MACHINE_RANK": "1",
    "TRANS_PEFT_MAIN_ADDRESS": "train-0:29500",
}


@pytest.fixture
def second(monkeypatch):
    for name, value in SECOND.items():
        monkeypatch.setenv(name, value)


def test_the_environment_names_the_machines():
    assert Machines.of(SECOND) == Machines(2, 1, "train-0", 29500)
    assert Machines.of({}) == Machines.of({"TRANS_PEFT_MACHINES": "1"}) == Machines()


@pytest.mark.parametrize(
    "change",
    [
        {"TRANS_PEFT_MACHINE_RANK": "2"},
        {"TRANS_PEFT_MACHINE_RANK": ""},
        {"TRANS_PEFT_MACHINES": "two"},
        {"TRANS_PEFT_MACHINES": ""},
        {"TRANS_PEFT_MAIN_ADDRESS": "train-0"},
        {"TRANS_PEFT_MAIN_ADDRESS": "train-0:70000"},
        {"TRANS_PEFT_MAIN_ADDRESS": ":29500"},
    ],
    ids=str,
)
def test_an_environment_that_names_no_machines_is_refused(change):
    (name,) = change
    with pytest.raises(InvalidSpecError, match=f"{name}={change[name]!r}"):
        Machines.of(SECOND | change)


def test_every_machine_has_the_same_number_of_processes():
    two = Machines.of(SECOND)
    assert [two.local_processes(n) for n in (1, 2, 8)] == [1, 1, 4]
    assert Machines().local_processes(3) == 3
    with pytest.raises(InvalidSpecError, match="a multiple of 2"):
        two.local_processes(3)


def test_accelerate_is_told_of_the_machines(make_job, tmp_path, second, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda _: range(8), raising=False)
    command = launch._command(make_job(tmp_path, recipe(processes=4)))
    config = json.loads(Path(command[command.index("--config_file") + 1]).read_text())
    told = {
        "num_machines": 2, "machine_rank": 1, "num_processes": 4,
        "main_process_ip": "train-0", "main_process_port": 29500,
    }  # fmt: skip
    assert {name: config[name] for name in told} == told
    assert command[command.index("--num_cpu_threads_per_process") + 1] == "4", "two processes here"


def test_a_training_of_one_process_needs_no_other_machine(make_job, tmp_path, second):
    command = launch._command(make_job(tmp_path, recipe()))
    config = json.loads(Path(command[command.index("--config_file") + 1]).read_text())
    assert (config["num_machines"], config["num_processes"]) == (1, 1)


def test_machines_without_a_common_work_folder_are_refused(make_job, tmp_path, monkeypatch):
    job = make_job(tmp_path, recipe())
    other = (job.identity(), 3)
    monkeypatch.setattr(finetune_module, "gather_object", lambda own: [*own, other])
    monkeypatch.setattr(finetune_module, "load_tokenizer", lambda _: pytest.fail("loaded"))
    with pytest.raises(TrainingError, match=r"(?s)different checkpoints.*of the steps 0, 3"):
        trained(job)


def test_machines_with_different_jobs_are_refused(make_job, tmp_path, monkeypatch):
    other = (make_job(tmp_path, replace(recipe(), seed=7)).identity(), 0)
    monkeypatch.setattr(finetune_module, "gather_object", lambda own: [*own, other])
    monkeypatch.setattr(finetune_module, "load_tokenizer", lambda _: pytest.fail("loaded"))
    with pytest.raises(InvalidSpecError, match=f"(?s)different jobs.*{other[0][:12]}"):
        trained(make_job(tmp_path, recipe()))


def test_a_training_starts_on_machine_0(make_job, tmp_path, second, monkeypatch):
    started = []
    monkeypatch.setattr(launch, "take_part", lambda job, on_event: started.append(job))
    with pytest.raises(InvalidSpecError, match=r"(?s)starts on machine 0.*join .*job\.json"):
        launch.fit(make_job(tmp_path, recipe(processes=2)), on_event=started.append)
    assert started == []


def test_a_training_that_has_ended_is_not_joined(make_job, tmp_path, second, monkeypatch):
    """Machine 0 returns the result and starts no processes that could be joined."""
    job, joined = make_job(tmp_path, recipe(processes=2)), []
    job.write()
    monkeypatch.setattr(join, "take_part", lambda job, on_event: joined.append(job))
    monkeypatch.setattr(join, "finished", lambda job: "result")
    join.main(job.file)
    assert joined == []


def test_machine_0_does_not_join(tmp_path, second, monkeypatch):
    monkeypatch.setenv("TRANS_PEFT_MACHINE_RANK", "0")
    with pytest.raises(InvalidSpecError, match="machine 0 starts a training"):
        join.main(tmp_path / "job.json")


def test_a_training_of_one_process_is_not_joined(make_job, tmp_path, second):
    job = make_job(tmp_path, recipe())
    job.write()
    with pytest.raises(InvalidSpecError, match="one process, which machine 0 runs"):
        join.main(job.file)


def test_a_machine_waits_for_the_job(make_job, tmp_path, second, monkeypatch):
    job, joined = make_job(tmp_path / "work", recipe(processes=2)), []
    monkeypatch.setattr(join.time, "sleep", lambda _: job.write())
    monkeypatch.setattr(join, "take_part", lambda job, on_event: joined.append(job))
    job.work_dir.mkdir()
    join.main(job.file)
    assert joined == [job]


@pytest.mark.slow  # three launchers and four processes import torch
@pytest.mark.timeout(900)
def test_two_machines_train_the_weights_of_two_processes_of_one(make_job, tmp_path, monkeypatch):
    """The machines are this host twice: a training, and another process that joins it."""
    held_out = write_examples(HELD_OUT, tmp_path / "held-out.jsonl")
    alone, job = (
        replace(make_job(tmp_path / name, TWO_PROCESSES), validation_file=held_out)
        for name in ("one", "two")
    )
    one = launch.fit(alone, on_event=ignored)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = SECOND | {"TRANS_PEFT_MAIN_ADDRESS": address}
    command = [sys.executable, "-m", "trans_peft.training.join", str(job.file)]
    other = subprocess.Popen(command, env=os.environ | environment)
    for name, value in (environment | {"TRANS_PEFT_MACHINE_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    two = launch.fit(job, on_event=ignored)
    assert other.wait() == 0
    assert two.weights_sha256 == one.weights_sha256


def ignored(event):
    """Ignore an event."""
