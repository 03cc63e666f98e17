"""Make the bases and rows of the study, each once, and score adapters of docs/survival.md.

All files are in one folder. An adapter is stored under the hash of its inputs. A training that was
killed resumes from its last checkpoint.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from demo.base import write_base_v1
from demo.sources import source_files
from demo.tasks import HeldOut, is_written, read_held_out, split, write
from demo.update import UpdateSettings, update, update_text
from study.plan import DATA_SEED, TASKS, UPDATES, V1, PlannedTraining, suite
from study.score_file import Score
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.data import parse_examples
from trans_peft.domain.evaluation import BARE, Suite
from trans_peft.domain.identity import content_sha256
from trans_peft.edges.file_store import FileStore
from trans_peft.training.events import Event, TrainingMetrics
from trans_peft.training.job import TrainingJob, TrainingResult

__all__ = [
    "Prepared",
    "end_with_parent",
    "log",
    "log_steps",
    "prepare",
    "score_of",
    "spared_layers",
    "write_update",
]

_PROBE_ROWS, _PROBE_LENGTH = 8, 128


def end_with_parent() -> None:
    """End this process when its parent has ended, even if the parent was killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def log(text: str) -> None:
    """Print a line with the current time."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


@dataclass(frozen=True)
class Prepared:
    """The rows and bases on this machine, as a value that can be sent to other processes."""

    folder: Path
    fingerprints: dict[str, str]
    updates: dict[str, dict[str, float]]
    suites: dict[str, Suite]

    def base(self, name: str) -> Path:
        """Return the folder of a base."""
        return self.folder / "bases" / name

    def rows(self, task: str) -> Path:
        """Return the folder of a task's rows: train.jsonl and eval.jsonl."""
        return self.folder / "rows" / task

    def job(self, planned: PlannedTraining) -> TrainingJob:
        """Return the training job of one adapter. Its folder is named by the hash of its inputs."""
        job = TrainingJob(
            recipe=planned.recipe(self.suites[planned.task]),
            base_folder=self.base(planned.base),
            base_name=planned.base,
            base_revision=self.fingerprints[planned.base],
            data_file=self.rows(planned.task) / "train.jsonl",
            work_dir=self.folder,
        )
        return replace(job, work_dir=self.folder / "adapters" / job.identity()[:16])

    def key(self, adapter: str, task: str, base: str) -> str:
        """Return the hash of the adapter's identity (or `BARE`), the suite and the base."""
        suite_of_task = self.suites[task]
        inputs = [adapter, self.fingerprints[base]]
        return content_sha256([*inputs, suite_of_task.suite_sha256, suite_of_task.decoding_sha256])


def prepare(folder: Path, updates: Collection[str] = tuple(UPDATES)) -> Prepared:
    """Write base v1, the rows of every task, and the updates, unless they exist.

    No update is trained on a file that supplied an evaluation row of any task.
    """
    rows = {name: folder / "rows" / name for name in TASKS}
    if not all(map(is_written, rows.values())):
        log("reading the source of the installed packages")
        files = list(source_files())
        for name, path in rows.items():
            log(f"{name}: extracting from {len(files):,} files")
            write(split(TASKS[name], files, DATA_SEED), path)
    (folder / "bases").mkdir(parents=True, exist_ok=True)
    v1 = write_base_v1(folder / "bases" / V1)
    held_out = read_held_out(rows.values())
    for name in updates:
        write_update(v1, folder / "bases" / name, UPDATES[name], held_out)
    bases = {name: folder / "bases" / name for name in (V1, *updates)}
    return Prepared(
        folder=folder,
        fingerprints={
            name: fingerprint(str(path), FileStore()).digest for name, path in bases.items()
        },
        updates={name: json.loads((bases[name] / "figures.json").read_text()) for name in updates},
        suites={
            name: suite(name, hashlib.sha256((path / "eval.jsonl").read_bytes()).hexdigest())
            for name, path in rows.items()
        },
    )


def write_update(before: Path, folder: Path, settings: UpdateSettings, held_out: HeldOut) -> None:
    """Train a base further and write it to `folder`, unless it exists (minutes)."""
    figures = folder / "figures.json"
    if not figures.exists():
        log(f"update {folder.name}: {settings.tokens:,} tokens")
        folder.mkdir(exist_ok=True)
        found = update(before, folder, settings, held_out)
        figures.write_text(json.dumps(found, indent=1))  # last


def spared_layers(prepared: Prepared) -> tuple[int, ...]:
    """Return the layers of v1 that the library proposes to spare, from 1,024 tokens of source."""
    import torch

    from trans_peft.models import load_base
    from trans_peft.perturbation import layer_criticality, propose_spared_layers

    base = load_base(prepared.base(V1), "float32")
    held_out = read_held_out(prepared.rows(name) for name in TASKS)
    stream: list[int] = []
    for text in update_text(held_out, DATA_SEED):
        stream += base.tokenizer(text)["input_ids"][:_PROBE_LENGTH]
        if len(stream) >= _PROBE_ROWS * _PROBE_LENGTH:
            break
    ids = torch.tensor(stream[: _PROBE_ROWS * _PROBE_LENGTH]).view(_PROBE_ROWS, _PROBE_LENGTH)
    return propose_spared_layers(layer_criticality(base.model, [{"input_ids": ids, "labels": ids}]))


def log_steps(planned: PlannedTraining) -> Callable[[Event], None]:
    """Return a callback that logs every twentieth step of a training."""

    def show(event: Event) -> None:
        if isinstance(event, TrainingMetrics) and event.step % 20 == 0:
            log(f"{planned}: {event}")

    return show


def score_of(
    prepared: Prepared, planned: PlannedTraining, base: str, key: str, result: TrainingResult
) -> Score:
    """Return the score of a trained adapter on a base."""
    results = _results(prepared, planned.task, base, result.folder)
    has_degrees = any(isinstance(one, float) for one in results)
    marks = "".join("1" if correct else "0" for correct in results)
    return Score(
        key=key,
        task=planned.task,
        arm=planned.arm,
        steps=planned.steps,
        seed=planned.seed,
        trained_on=planned.base,
        scored_on=base,
        right="" if has_degrees else marks,
        perturbation=asdict(planned.perturbation),
        train_seconds=round(result.seconds, 1),
        degrees=[round(float(degree), 4) for degree in results] if has_degrees else [],
    )


def _results(prepared: Prepared, task: str, base: str, adapter: Path) -> Sequence[bool | float]:
    from trans_peft.models import load_base
    from trans_peft.transfer.load_adapter import attached
    from trans_peft.validation.evaluate import evaluate

    rows = prepared.rows(task) / "eval.jsonl"
    loaded = load_base(prepared.base(base), prepared.suites[task].dtype)
    with attached(loaded.model, adapter) as model:
        found = evaluate(
            model,
            loaded.tokenizer,
            prepared.suites[task],
            parse_examples(rows.read_bytes(), rows.name),
            weights_sha256=BARE,
            base_fingerprint_sha256=prepared.fingerprints[base],
        )
    return [item.correct for item in found.items]
