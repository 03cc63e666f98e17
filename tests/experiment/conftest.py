"""Tiny bases that are versions of one model, data, and trainings in this process.

`launch.fit` starts processes that import torch for seconds each; `fit_here` calls what they run.
"""

import gc
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer, write_tiny_base
from trans_peft.training.job import TrainingJob, TrainingResult

ROWS = [
    {"prompt": f"{a}, then {b}", "completion": str((b + 1) % 10)}
    for a in range(8)
    for b in range(10)
]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_versions(folder: Path) -> None:
    """Write v1, which answers some of the rows, and v2 and v3 with other FFN weights."""
    model, tokenizer = tiny_model(layers=1), tiny_tokenizer()
    ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in ROWS])
    ids = torch.cat([ids, torch.full((len(ROWS), 1), tokenizer.eos_token_id)], dim=1)
    labels = torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - 2, -100, ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for seed, name in enumerate(("v1", "v2", "v3")):
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in model.model.layers[0].mlp.parameters():
                weight += 0.1 * seed * torch.randn_like(weight)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with v1, its updates v2 and v3, an unrelated base, and rows."""
    folder = tmp_path_factory.mktemp("experiment")
    write_versions(folder)
    write_tiny_base(folder / "unrelated", seed=7, layers=1)
    write_tiny_base(folder / "deeper", layers=2)
    write_rows(folder / "train.jsonl", ROWS[:60])
    write_rows(folder / "sums.jsonl", ROWS[60:])
    write_rows(folder / "more.jsonl", ROWS[40:70])
    for name in ("tables", "repeats"):
        shutil.copy(Path(__file__).with_name(f"{name}.yaml"), folder)
    return folder


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[TrainingJob]]:
    """Train in this process. The list has the jobs that were trained."""
    from accelerate import PartialState

    from trans_peft.experiment import cells
    from trans_peft.isolation import call
    from trans_peft.training import finetune, launch

    torch.set_num_threads(1)
    jobs: list[TrainingJob] = []

    def fit_here(job: TrainingJob, *, on_event) -> TrainingResult:
        job.check()
        if (done := launch.finished(job)) is not None:
            return done
        jobs.append(job)
        gc.freeze()  # accelerate collects after each training, which takes longer than the training
        finetune.finetune(job, PartialState(cpu=True), on_event)
        return TrainingResult.read(job.result_file)

    def call_here(self, header: bytes, request: bytes) -> object:
        function, arguments = pickle.loads(request)
        return json.loads(json.dumps(function(*arguments)))

    # `tests/isolation` tests child processes. Hundreds of them take longer than the trainings.
    monkeypatch.setattr(call._Call, "run", call_here)
    # `tests/training/test_adapter_check.py` tests the check, which takes as long as the training.
    monkeypatch.setattr(finetune, "check_adapter_is_trainable", lambda *_: None)
    monkeypatch.setattr(cells, "fit", fit_here)
    yield jobs
    gc.unfreeze()
