"""Measures what the compensation of an adapter costs, compared with training it anew.

In each cell of `study.distillation`, with the first seed, the same process compensates the plain
adapter of v1 for the update (answers to the prompts, inputs of the modules, matrices) and trains a
plain adapter of 120 steps on the new base. Both include the loading of their bases.

`survive.cost_vs_retrain` is the time of the compensation / that of the training: the median over
the cells, with the middle half.

    python -m benchmarks.compensation [--study .study] [--clock wall|process] [--threads 2]
        [--cells 4]

Bases, rows and adapters of v1 are made first, unless they exist (minutes).
"""

import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate import PartialState

from benchmarks.ratios import Clock, machine, middle, parser, prepare, record
from study.cells import Prepared
from study.cells import prepare as prepare_study
from study.distillation import CELLS, RANKS, SEEDS, UNLABELED, compensated, prompts
from study.distillation import trained_on_its_base as trained
from study.plan import STEPS, PlannedTraining
from trans_peft.domain.recipe import Perturbation
from trans_peft.training.finetune import finetune
from trans_peft.training.job import TrainingJob


def main() -> None:
    options = parser(__doc__.partition("\n")[0], pairs=1)
    options.add_argument("--study", type=Path, default=Path(".study"))
    options.add_argument("--cells", type=int, default=len(CELLS))
    chosen = options.parse_args()
    clock = prepare(chosen)
    prepared = prepare_study(chosen.study.resolve(), sorted({update for _, update in CELLS}))
    ratios, order = [], random.Random(0)
    for task, update in CELLS[: chosen.cells]:
        planned = PlannedTraining(task, "plain", Perturbation(), STEPS[0], SEEDS[0])
        job, adapter = trained(prepared, planned)
        made = prompts(prepared, job, UNLABELED)
        compensate = partial(compensated, prepared, planned, adapter, update, RANKS[0], made)
        anew = partial(train_anew, prepared, job, update)
        seconds = {}
        for work in order.sample([compensate, anew], 2):
            seconds[work] = taken(work, clock)
        ratios.append(seconds[compensate] / seconds[anew])
        print(
            f"{task}, {update}: {seconds[compensate]:.0f} s / {seconds[anew]:.0f} s = "
            f"{ratios[-1]:.3f}",
            flush=True,
        )
    shape = f"SmolLM2-135M, rank 16, {len(made)} prompts / {STEPS[0]} steps of 16 rows"
    record("survive.cost_vs_retrain", middle(ratios), machine(chosen, shape))


def train_anew(prepared: Prepared, job: TrainingJob, update: str) -> None:
    """Train a plain adapter on the new base, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        base, revision = prepared.base(update), prepared.fingerprints[update]
        moved = replace(job, base_folder=base, base_revision=revision, work_dir=Path(folder))
        finetune(moved, PartialState(), lambda event: None)


def taken(work: Callable[[], object], clock: Clock) -> float:
    """Return the seconds of a call."""
    started = clock()
    work()
    return clock() - started


if __name__ == "__main__":
    main()
