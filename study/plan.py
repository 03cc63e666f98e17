"""The tasks, updates and experiments of the study, fixed before scoring.

The settings of the arms were chosen by `CANDIDATES`, on one task, update and seed. `STUDY` reports
them with other seeds, also on the other pairs of task and update.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from demo.exceptions import examples as exceptions
from demo.functions import signatures
from demo.tasks import Task
from demo.update import UpdateSettings
from trans_peft.cli.files import read_experiment
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.experiment import PLAIN, Experiment
from trans_peft.domain.recipe import Perturbation, TrainingRecipe
from trans_peft.experiment.cells import Score
from trans_peft.experiment.score_file import ScoreFile

__all__ = [
    "CANDIDATES",
    "DATA_SEED",
    "STEPS",
    "STUDY",
    "TASKS",
    "UPDATES",
    "V1",
    "PlannedTraining",
    "arms",
    "results",
    "scores",
    "suite",
]

V1 = "v1"
DATA_SEED = 2
"""A different split of the files than that of the demo."""

TASKS = {
    task.name: task
    for task in (
        Task("exceptions", exceptions, train_per_label=400, evaluation_per_label=64),
        Task("signatures", signatures, train_per_label=400, evaluation_per_label=64),
    )
}

UPDATES = {
    "all": UpdateSettings(steps=32, learning_rate=3e-4, seed=0),
    "ffn": UpdateSettings(steps=64, learning_rate=2e-3, seed=11, weights="ffn"),
}
"""v1 trained further: all weights, and only those of FFNs (the assumption of the paper).

Both are strong enough that plain adapters lose accuracy: see docs/study.md.
"""

STUDY, CANDIDATES = (
    read_experiment(Path(__file__).with_name(f"{name}.yaml")) for name in ("study", "candidates")
)
"""The experiments. Their families are the tasks."""

_usual = STUDY.training.optimizer.steps
assert _usual is not None
STEPS = (_usual, *STUDY.longer)


def results(experiment: Experiment) -> Path:
    """Return the folder of an experiment's results."""
    return Path(__file__).parent / "results" / experiment.name


def scores(experiment: Experiment) -> tuple[Score, ...]:
    """Return the stored scores of an experiment."""
    return tuple(ScoreFile(results(experiment) / "scores.jsonl", Score))


@dataclass(frozen=True)
class PlannedTraining:
    """One adapter of docs/survival.md to train: task, arm, perturbation, steps, seed and base."""

    task: str
    arm: str
    perturbation: Perturbation
    steps: int
    seed: int
    base: str = V1

    def __str__(self) -> str:
        return f"{self.task}, {self.arm}, {self.steps} steps, seed {self.seed}, on {self.base}"

    def recipe(self, suite: Suite) -> TrainingRecipe:
        """Return the training recipe, with the settings of the study."""
        return TrainingRecipe(
            adapter=self.task,
            family="smollm2-135m",
            base_version=self.base,
            data=DataSource(f"{self.task}/train.jsonl"),
            suites=(suite,),
            spec=STUDY.methods["LoRA"],
            perturbation=self.perturbation,
            optimizer=STUDY.optimizer(self.steps),
            dtype=STUDY.training.dtype,
            seed=self.seed,
            checkpoint_steps=STUDY.training.checkpoint_steps,
        )


def suite(task: str, sha256: str) -> Suite:
    """Return the suite of a task. The answer is one of eight names, scored by exact match."""
    (found,) = STUDY.suites_of(task)
    return replace(found, data=DataSource(f"{task}/eval.jsonl", sha256))


def arms(spared_layers: Sequence[int]) -> Mapping[str, Perturbation]:
    """Return the perturbations of the study's arms, sparing these layers where one spares any."""
    return {
        name: replace(arm, spared_layers=tuple(spared_layers)) if arm.spared_layers else arm
        for name, arm in {"plain": PLAIN, **STUDY.arms}.items()
    }
