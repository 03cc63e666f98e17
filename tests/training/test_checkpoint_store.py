"""Checkpoints in the artifact store: bounded, verified, and enough to continue on another host."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.training.conftest import recipe
from tests.training.runs import PERTURBED, all_gone, processes_of, run
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import MemoryStore
from trans_peft.errors import IntegrityError, StoreError, TrainingCancelled
from trans_peft.training.checkpoint_store import CheckpointStore, continued
from trans_peft.training.events import (
    CheckpointSaved,
    LogLine,
    TrainingMetrics,
    TrainingStarted,
)
from trans_peft.training.launch import fit

PREFIX = "s3://data/checkpoints/run"


def saved(folder, step, content=b"weights"):
    """Write a complete checkpoint as training does."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_model.safetensors").write_bytes(content + b"%d" % step)
    (checkpoint / "complete").write_text("adapter_model.safetensors")
    return checkpoint


@pytest.fixture
def filled(tmp_path):
    """A store with the checkpoints of four steps, uploaded in order."""
    store = MemoryStore()
    checkpoints = CheckpointStore(store, PREFIX)
    for step in (5, 10, 15, 20):
        checkpoints.upload(saved(tmp_path / "here", step))
    return store, checkpoints


def test_the_two_newest_checkpoints_are_kept(filled):
    store, checkpoints = filled
    assert checkpoints.steps() == [20, 15]
    assert [file.name for file in store.list(PREFIX)] == [
        f"checkpoint-{step}{part}"
        for step in (15, 20)
        for part in (".json", "/adapter_model.safetensors", "/complete")
    ]
    sha256 = hashlib.sha256(b"weights20").hexdigest()
    with store.read(f"{PREFIX}/checkpoint-20.json") as chunks:
        assert json.loads(b"".join(chunks))["adapter_model.safetensors"] == sha256


def test_a_downloaded_checkpoint_is_the_uploaded_one(filled, tmp_path):
    _, checkpoints = filled
    checkpoints.download(20, tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["checkpoint-20"]
    for path in (tmp_path / "here" / "checkpoint-20").iterdir():
        assert (tmp_path / "there" / "checkpoint-20" / path.name).read_bytes() == path.read_bytes()


def test_nothing_stays_after_clear(filled):
    store, checkpoints = filled
    store.write(f"{PREFIX}/checkpoint-25/half", io.BytesIO(b"of an upload that was killed"))
    store.write(f"{PREFIX}-of-another/checkpoint-5.json", io.BytesIO(b"{}"))
    checkpoints.clear()
    assert store.list(PREFIX) == ()
    assert len(store.list(f"{PREFIX}-of-another")) == 1


def damage(store, name, content):
    if content is None:
        store.remove(f"{PREFIX}/{name}")
    else:
        store.write(f"{PREFIX}/{name}", io.BytesIO(content))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("checkpoint-20/adapter_model.safetensors", b"other", "changed"),
        ("checkpoint-20/adapter_model.safetensors", None, "is missing"),
        ("checkpoint-20.json", b"[]", "damaged"),
        ("checkpoint-20.json", b"{", "damaged"),
        ("checkpoint-20.json", b"{}", "damaged"),
        ("checkpoint-20.json", b'{"../x": "0", "complete": "0"}', "damaged"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_an_older_one_is_used(
    filled, tmp_path, make_job, name, content, problem
):
    store, checkpoints = filled
    damage(store, name, content)
    with pytest.raises(IntegrityError, match=problem):
        checkpoints.download(20, tmp_path / "there")
    assert not list((tmp_path / "there").glob("*"))
    job, events = make_job(tmp_path / "job", recipe()), []
    continued(job, checkpoints, events.append)
    assert [path.name for path in job.checkpoint_folder.iterdir()] == ["checkpoint-15"]
    assert "step 20 is not used" in str(events[0])
    assert "step 15 comes from the artifact store" in str(events[1])


def test_an_incomplete_upload_does_not_count(filled, tmp_path):
    store, checkpoints = filled
    store.remove(f"{PREFIX}/checkpoint-20.json")
    assert checkpoints.steps() == [15]


@pytest.mark.parametrize(("here", "then"), [(15, {15, 20}), (20, {20}), (25, {25})])
def test_only_a_newer_checkpoint_is_downloaded(filled, tmp_path, make_job, here, then):
    _, checkpoints = filled
    job = make_job(tmp_path / "job", recipe())
    saved(job.checkpoint_folder, here)
    continued(job, checkpoints, lambda event: None)
    steps = {int(p.name.removeprefix("checkpoint-")) for p in job.checkpoint_folder.iterdir()}
    assert steps == then


def test_a_failed_copy_is_reported_and_does_not_end_training(tmp_path, make_job):
    class Broken(MemoryStore):
        def write(self, uri, data):
            raise StoreError("S3 is down")

    job, events = make_job(tmp_path / "job", recipe()), []
    copying = continued(job, CheckpointStore(Broken(), PREFIX), events.append)
    saved(job.checkpoint_folder, 3)
    copying(CheckpointSaved(3))
    copying(CheckpointSaved(6))  # training deleted it meanwhile
    lines = [str(event) for event in events if isinstance(event, LogLine)]
    assert "step 3 was not copied: S3 is down" in lines[0]
    assert "step 6 was not copied" in lines[1]


class Watched(MemoryStore):
    """A store that calls `on_write` before each write."""

    def __init__(self, on_write):
        super().__init__()
        self.on_write = on_write

    def write(self, uri, data):
        self.on_write()
        super().write(uri, data)


def test_a_checkpoint_that_is_deleted_during_its_copy_is_copied_whole(tmp_path, make_job):
    job, events = make_job(tmp_path / "job", recipe()), []

    def end_training():
        job.result_file.touch()
        shutil.rmtree(job.checkpoint_folder, ignore_errors=True)

    checkpoints = CheckpointStore(Watched(end_training), PREFIX)
    copying = continued(job, checkpoints, events.append)
    saved(job.checkpoint_folder, 3)
    copying(CheckpointSaved(3))
    assert events == [CheckpointSaved(3)]
    checkpoints.download(3, tmp_path / "there")
    assert (tmp_path / "there/checkpoint-3/adapter_model.safetensors").read_bytes() == b"weights3"
    assert not list(job.work_dir.glob("*.upload"))


def test_the_missing_checkpoint_of_an_ended_training_is_not_reported(tmp_path, make_job):
    job, events = make_job(tmp_path / "job", recipe()), []
    copying = continued(job, CheckpointStore(MemoryStore(), PREFIX), events.append)
    job.result_file.touch()
    copying(CheckpointSaved(3))
    assert events == [CheckpointSaved(3)]


def test_a_checkpoint_that_is_partly_deleted_is_not_copied(tmp_path):
    store = MemoryStore()
    checkpoint = saved(tmp_path, 3)
    (checkpoint / "adapter_model.safetensors").unlink()
    with pytest.raises(StoreError, match=r"adapter_model\.safetensors"):
        CheckpointStore(store, PREFIX).upload(checkpoint)
    assert store.list(PREFIX) == ()


def test_without_a_store_the_callback_is_that_of_the_caller(make_job, tmp_path):
    on_event = [].append
    assert continued(make_job(tmp_path, recipe()), None, on_event) is on_event


HOST = """
import sys, pathlib
from trans_peft.edges.file_store import FileStore
from trans_peft.training.checkpoint_store import CheckpointStore, continued
from trans_peft.training.job import TrainingJob
from trans_peft.training.launch import fit
job = TrainingJob.read(pathlib.Path(sys.argv[1]))
show = lambda event: print(event, flush=True)
fit(job, on_event=continued(job, CheckpointStore(FileStore(), sys.argv[2]), show))
"""


@pytest.mark.slow  # two training processes, about 15 s
def test_a_killed_host_is_replaced_by_another_one_that_ends_in_the_same_weights(
    uninterrupted, make_job, tmp_path
):
    job = make_job(tmp_path / "first", PERTURBED)
    job.check()
    stored = tmp_path / "stored"
    command = [sys.executable, "-c", HOST, str(job.write()), str(stored)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as host:
        for line in host.stdout:
            if line.startswith("step 5"):  # after the copy of step 3, which is made before
                break
        host.send_signal(signal.SIGKILL)
    assert all_gone(job)
    shutil.rmtree(job.work_dir)

    checkpoints = CheckpointStore(FileStore(), str(stored))
    other = make_job(tmp_path / "second", PERTURBED)
    events = []
    result = fit(other, on_event=continued(other, checkpoints, events.append))
    (started,) = [event for event in events if isinstance(event, TrainingStarted)]
    assert started.step >= 3
    assert result.weights_sha256 == uninterrupted.result.weights_sha256
    assert len(checkpoints.steps()) == 2


@pytest.mark.slow  # a training process that is terminated, and one that continues
def test_sigterm_saves_a_checkpoint_within_30_s(uninterrupted, make_job, tmp_path):
    job = make_job(tmp_path, PERTURBED)
    events, sent_s = [], []

    def on_event(event):
        events.append(event)
        if isinstance(event, TrainingMetrics) and event.step == 4 and not sent_s:
            sent_s.append(time.monotonic())
            for pid in processes_of(job):  # the machine is taken away: everyone gets it
                os.kill(pid, signal.SIGTERM)

    with pytest.raises(TrainingCancelled, match=r"SIGTERM|terminated after step"):
        fit(job, on_event=on_event)
    assert time.monotonic() - sent_s[0] < 30
    last = max(event.step for event in events if isinstance(event, CheckpointSaved))
    assert 4 <= last < 8
    resumed = run(job)
    (started,) = resumed.of(TrainingStarted)
    assert started.step == last
    assert resumed.result.weights_sha256 == uninterrupted.result.weights_sha256


@pytest.mark.slow  # a training of two processes
def test_two_processes_stop_at_the_same_step(make_job, tmp_path):
    job = make_job(tmp_path, recipe(masking_p=0.2, processes=2, checkpoint_steps=50, steps=50))
    saved_steps = []

    def on_event(event):
        if isinstance(event, CheckpointSaved):
            saved_steps.append(event.step)
        if isinstance(event, TrainingMetrics) and event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(job, on_event=on_event)
    assert all_gone(job)
    (step,) = saved_steps
    assert 3 <= step < 50
    files = [path.name for path in (job.checkpoint_folder / f"checkpoint-{step}").iterdir()]
    assert {"complete", "rng_state_0.pth", "rng_state_1.pth"} <= set(files)
