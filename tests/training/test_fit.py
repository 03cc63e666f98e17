"""Real child processes: few of them, shared by the tests, because each start costs seconds."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from tests.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from tests.training.conftest import EXAMPLES, recipe
from tests.training.runs import PERTURBED, all_gone, processes_of, run
from tests.training.test_trainer import restated
from trans_peft.data import write_examples
from trans_peft.domain.compute import ComputeSettings
from trans_peft.domain.validation import ValidationSettings
from trans_peft.errors import OutOfMemoryError, TrainingCancelled, TrainingError
from trans_peft.methods.specs import attach
from trans_peft.models import adapter_weights_sha256
from trans_peft.perturbation import perturbed
from trans_peft.text.saved_template import saved_template
from trans_peft.training import launch
from trans_peft.training.batches import training_order
from trans_peft.training.events import (
    CheckpointSaved,
    Event,
    TrainingMetrics,
    TrainingStarted,
    ValidationMetrics,
)
from trans_peft.training.job import TrainingJob
from trans_peft.training.launch import fit

TWO_PROCESSES = replace(
    recipe(masking_p=0.2, dropping_p=0.3, processes=2, checkpoint_steps=2),
    compute=ComputeSettings(gradient_checkpointing=True),
    validation=ValidationSettings(share=0.2, every_steps=5, keep="last"),
)
HELD_OUT = EXAMPLES[:5]


class Cancelled(BaseException):
    """A BaseException, like Prefect's TerminationSignal."""


@pytest.fixture(scope="session")
def cancelled(make_job, tmp_path_factory) -> TrainingJob:
    """A run that is cancelled after its fourth step; its last regular checkpoint has three."""
    job = make_job(tmp_path_factory.mktemp("cancelled"), PERTURBED)

    def on_event(event: Event) -> None:
        if isinstance(event, TrainingMetrics) and event.step == 4:
            assert processes_of(job)
            raise Cancelled

    with pytest.raises(Cancelled):
        fit(job, on_event=on_event)
    assert all_gone(job, timeout_s=1)
    return job


@pytest.fixture(scope="session")
def orphaned(make_job, tmp_path_factory) -> TrainingJob:
    """Two processes whose parent is killed (SIGKILL) after a checkpoint."""
    folder = tmp_path_factory.mktemp("orphaned")
    held_out = write_examples(HELD_OUT, folder / "held-out.jsonl")
    job = replace(make_job(folder / "work", TWO_PROCESSES), validation_file=held_out)
    job.work_dir.mkdir()
    command = [sys.executable, "-c", PARENT, str(job.write())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        seen = []
        for line in parent.stdout:
            seen.append(line)
            if line.startswith("checkpoint after step 2"):
                break
        children = processes_of(job) - {parent.pid}
        parent.send_signal(signal.SIGKILL)
    assert len(children) == 3, (
        f"expected the launcher and two training processes; seen {''.join(seen)}"
    )
    assert all_gone(job)
    return job


PARENT = """
import sys, pathlib
from trans_peft.training.job import TrainingJob
from trans_peft.training.launch import fit
fit(TrainingJob.read(pathlib.Path(sys.argv[1])), on_event=lambda event: print(event, flush=True))
"""


def test_a_run_reports_its_progress(uninterrupted):
    (started,) = uninterrupted.of(TrainingStarted)
    assert (started.step, started.total_steps, started.processes) == (0, 8, 1)
    assert [event.step for event in uninterrupted.of(TrainingMetrics)] == list(range(1, 9))
    assert {3, 6} <= {event.step for event in uninterrupted.of(CheckpointSaved)}
    for event in uninterrupted.of(TrainingMetrics):
        assert event.loss > 0
        assert event.tokens_per_s > 0
    rates = [event.learning_rate for event in uninterrupted.of(TrainingMetrics)]
    assert max(rates) == rates[2] == 1e-2, "two warm-up steps, then the cosine schedule"
    assert rates[-1] < 1e-3


def test_the_result_matches_the_files(uninterrupted):
    result = uninterrupted.result
    assert result.weights_sha256 == adapter_weights_sha256(result.folder)
    assert sorted(path.name for path in result.folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
    ]
    assert saved_template(result.folder) == CHAT_TEMPLATE
    assert (result.steps, result.shortened_rows) == (8, 0)
    (started,) = uninterrupted.of(TrainingStarted)
    assert result.trainable_parameters == started.trainable_parameters
    losses = [event.loss for event in uninterrupted.of(TrainingMetrics)]
    assert result.final_loss == pytest.approx(sum(losses) / 8)


def test_the_adapter_names_its_base_and_revision(uninterrupted):
    config = json.loads((uninterrupted.result.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "s3://bases/tiny/v1"
    assert config["revision"] == "f00d"
    assert config["peft_type"] == "LORA"


def test_a_finished_run_is_not_repeated(uninterrupted):
    again = run(uninterrupted.job)
    assert again.result == uninterrupted.result
    assert again.events == []


def test_a_finished_run_in_a_moved_folder_is_not_repeated(uninterrupted, tmp_path):
    moved = shutil.copytree(uninterrupted.job.work_dir, tmp_path / "moved")
    again = run(replace(uninterrupted.job, work_dir=moved))
    assert again.events == []
    assert again.result == replace(uninterrupted.result, folder=moved / "adapter")


@pytest.mark.slow
def test_a_cancelled_run_resumes_to_the_same_weights(uninterrupted, cancelled):
    resumed = run(cancelled)
    (started,) = resumed.of(TrainingStarted)
    assert 4 <= started.step < 8, "the checkpoint that was made when the run was cancelled"
    assert resumed.result.weights_sha256 == uninterrupted.result.weights_sha256
    assert [(e.step, e.loss) for e in resumed.of(TrainingMetrics)] == [
        (e.step, e.loss) for e in uninterrupted.of(TrainingMetrics)[started.step :]
    ]


@pytest.mark.slow
def test_two_processes_end_with_a_killed_parent_and_resume_to_the_weights_of_a_plain_loop(
    orphaned, tiny_base
):
    """The reference is one process, one row at a time, and nothing of accelerate, TRL or DDP.

    Nor does it checkpoint activations.
    """
    resumed = run(orphaned)
    (started,) = resumed.of(TrainingStarted)
    assert started.step >= 2
    assert started.processes == 2

    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base), resumed.result.folder
    ).eval()
    plain = trained_by_a_plain_loop()
    ids = torch.arange(40)[None]
    logits = stock(ids).logits
    torch.testing.assert_close(logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    assert (logits - tiny_model().eval()(ids).logits).abs().max() > 1e-2, (
        "training changed the logits"
    )
    last = resumed.of(ValidationMetrics)[-1]
    with torch.no_grad():
        expected = restated(plain, HELD_OUT).item()
    assert (last.step, last.loss) == (8, pytest.approx(expected, rel=1e-4))
    assert resumed.result.validation_loss == last.loss


def trained_by_a_plain_loop() -> torch.nn.Module:
    tokenizer, settings = tiny_tokenizer(), TWO_PROCESSES.optimizer
    torch.manual_seed(TWO_PROCESSES.seed)
    base = tiny_model()
    torch.manual_seed(TWO_PROCESSES.seed)
    model = attach(base, TWO_PROCESSES.spec).train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=settings.learning_rate,
        weight_decay=0.0,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.steps)
    rows = [(len(e.prompt_ids(tokenizer)), e.full_ids(tokenizer)) for e in EXAMPLES]
    order = training_order([len(whole) for _, whole in rows], 4, settings.steps, TWO_PROCESSES.seed)
    for step in range(settings.steps):
        batch = [rows[i] for i in order[4 * step : 4 * step + 4]]
        answer_tokens = sum(len(whole) - prompt for prompt, whole in batch)
        for rank, its_rows in enumerate((batch[:2], batch[2:])):
            with perturbed(
                model, TWO_PROCESSES.perturbation, seed=TWO_PROCESSES.seed, rank=rank
            ) as handle:
                for prompt, whole in its_rows:
                    handle.seek(step)  # a rank's rows are one batch there, and share its draws
                    ids = torch.tensor([whole])
                    log_probs = model(ids).logits[0, :-1].log_softmax(-1)
                    picked = log_probs[torch.arange(len(whole) - 1), ids[0, 1:]]
                    (-picked[prompt - 1 :].sum() / answer_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


FAILURES = {
    "host": (
        "import sys; sys.exit('RuntimeError: DefaultCPUAllocator: can\\'t allocate memory')",
        OutOfMemoryError,
        "batch_size",
    ),
    "killed": ("import os; os.kill(os.getpid(), 9)", OutOfMemoryError, r"was killed \(SIGKILL\)"),
    "child killed": (
        "import sys; sys.exit('died with <Signals.SIGKILL: 9>.')",
        OutOfMemoryError,
        r"was killed \(SIGKILL\)",
    ),
    "ended": ("import os; os.kill(os.getpid(), 15)", TrainingCancelled, "SIGTERM"),
    "crash": ("raise SystemError('a broken state')", TrainingError, "a broken state"),
    "device": (
        'print(\'{"event": "Failed", "error": "OutOfMemoryError", "message": "CUDA: no"}\')',
        OutOfMemoryError,
        "CUDA: no",
    ),
    "silent": ("pass", TrainingError, "exit code 0"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_the_cause_of_a_failed_process_is_named(make_job, tmp_path, monkeypatch, failure):
    script, kind, message = FAILURES[failure]
    monkeypatch.setattr(launch, "_command", lambda job: [sys.executable, "-c", script])
    with pytest.raises(TrainingError, match=message) as caught:
        fit(make_job(tmp_path, recipe()), on_event=lambda event: None)
    assert type(caught.value) is kind


def test_a_users_accelerate_configuration_changes_nothing(make_job, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert not any(name.startswith("ACCELERATE_") for name in launch._environment(1))
    command = launch._command(make_job(tmp_path, recipe()))
    config = json.loads(Path(command[command.index("--config_file") + 1]).read_text())
    assert (config["mixed_precision"], config["distributed_type"]) == ("no", "NO")


def test_a_training_gets_no_credentials(monkeypatch):
    secrets = ("AWS_SECRET_ACCESS_KEY", "PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_PASSWORD")
    for name in (*secrets, "HF_TOKEN"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert "secret" not in launch._environment(1).values()
    assert launch._environment(1)["NCCL_DEBUG"] == "INFO"


@pytest.mark.parametrize(
    ("visible", "processes", "given"),
    [(None, 2, "0,1"), ("3,5,7", 1, "3"), ("3,5,7", 2, "3,5"), ("", 1, ""), ("4", 2, "4")],
)
def test_each_process_gets_one_of_the_visible_gpus(monkeypatch, visible, processes, given):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert launch._environment(processes)["CUDA_VISIBLE_DEVICES"] == given


def test_openmp_threads_do_not_spin_unless_the_caller_sets_the_policy(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert launch._environment(1)["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert launch._environment(1)["OMP_WAIT_POLICY"] == "ACTIVE"
