"""Training runs in real child processes, and the processes of a run."""

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.training.conftest import recipe
from trans_peft.training.events import Event
from trans_peft.training.job import TrainingJob, TrainingResult
from trans_peft.training.launch import fit

PERTURBED = recipe(dropout=0.1, masking_p=0.2, dropping_p=0.3)


@dataclass(frozen=True)
class Run:
    job: TrainingJob
    result: TrainingResult
    events: list[Event]

    def of(self, kind: type) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


def run(job: TrainingJob) -> Run:
    events: list[Event] = []
    return Run(job, fit(job, on_event=events.append), events)


def processes_of(job: TrainingJob) -> set[int]:
    """The ids of all processes that work on this job, whatever their group."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(job.work_dir / "job.json") in (entry / "cmdline").read_text():
                found.add(int(entry.name))
    return found


def all_gone(job: TrainingJob, timeout_s: float = 10) -> bool:
    deadline = time.monotonic() + timeout_s
    while processes_of(job) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not processes_of(job)
