"""The plan of the study: tasks, updates, arms and seeds, fixed before scoring.

The settings of the arms were chosen on one task, update and seed (`CHOSEN_ON`), and the comparison
is reported on the others. `uniform` is the paper's policy, equal in every layer. `spared` excludes
the layers that `propose_spared_layers` returns.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from demo.exceptions import examples as exceptions
from demo.functions import signatures
from demo.tasks import Task
from demo.update import UpdateSettings
from trans_peft.domain.adapter import AdapterSpec
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.recipe import OptimizerSettings, Perturbation, TrainingRecipe

__all__ = [
    "DATA_SEED",
    "TASKS",
    "UPDATES",
    "V1",
    "PlannedTraining",
    "arms",
    "candidates",
    "planned_trainings",
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

CHOSEN_ON = ("exceptions", "all")
"""Task and update on which the settings were chosen, with seed 0."""

SEEDS = (1, 2, 3)
STEPS = (120, 240)
_LORA = AdapterSpec(
    "LORA",
    {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"),  # the paper's
    },
)


@dataclass(frozen=True)
class PlannedTraining:
    """One adapter to train: task, arm, perturbation, steps, seed and base."""

    task: str
    arm: str
    perturbation: Perturbation
    steps: int
    seed: int
    base: str = V1
    scored_on: tuple[str, ...] = (V1, *UPDATES)

    def __str__(self) -> str:
        return f"{self.task}, {self.arm}, {self.steps} steps, seed {self.seed}, on {self.base}"

    def recipe(self, suite: Suite) -> TrainingRecipe:
        """Return the training recipe."""
        return TrainingRecipe(
            adapter=self.task,
            family="smollm2-135m",
            base_version=self.base,
            data=DataSource(f"{self.task}/train.jsonl"),
            suites=(suite,),
            spec=_LORA,
            perturbation=self.perturbation,
            optimizer=OptimizerSettings(
                learning_rate=1e-3,
                steps=self.steps,
                batch_size=16,
                warmup_steps=self.steps // 12,
                max_length=128,
            ),
            dtype="bfloat16",
            seed=self.seed,
            checkpoint_steps=60,
        )


def suite(task: str, sha256: str) -> Suite:
    """Return the suite of a task. The answer is one of eight names, scored by exact match."""
    return Suite(
        name=task,
        data=DataSource(f"{task}/eval.jsonl", sha256),
        max_new_tokens=8,
        stop=("\n", "("),  # a bare base continues with a call: its answer still counts
    )


def arms(spared_layers: Sequence[int]) -> Mapping[str, Perturbation]:
    """Return the perturbations of the reported arms."""
    return {
        "plain": Perturbation(),
        "uniform": Perturbation(masking_p=0.1, dropping_p=0.1),
        "spared": Perturbation(masking_p=0.1, spared_layers=tuple(spared_layers)),
    }


def candidates(spared_layers: Sequence[int]) -> Mapping[str, Perturbation]:
    """Return the settings from which the arm `spared` was chosen."""
    spared = tuple(spared_layers)
    return {
        "masking 0.1": Perturbation(masking_p=0.1, spared_layers=spared),
        "masking 0.1, element": Perturbation(
            masking_p=0.1, granularity="element", spared_layers=spared
        ),
        "dropping 0.1": Perturbation(dropping_p=0.1, spared_layers=spared),
        "both 0.1": Perturbation(masking_p=0.1, dropping_p=0.1, spared_layers=spared),
        "both 0.05": Perturbation(masking_p=0.05, dropping_p=0.05, spared_layers=spared),
    }


def planned_trainings(spared_layers: Sequence[int]) -> Iterator[PlannedTraining]:
    """Yield every adapter of the study, the most informative first."""
    task, update = CHOSEN_ON
    chosen_from = {"plain": Perturbation(), **candidates(spared_layers)}
    for name, perturbation in chosen_from.items():
        yield PlannedTraining(task, name, perturbation, STEPS[0], seed=0, scored_on=(V1, update))
    reported = arms(spared_layers)
    for task in ("signatures", "exceptions"):
        for seed in SEEDS:
            for name, perturbation in reported.items():
                yield PlannedTraining(task, name, perturbation, STEPS[0], seed)
            yield PlannedTraining(task, "plain", Perturbation(), STEPS[0], seed, "ffn", ("ffn",))
        for name in ("spared", "plain", "uniform"):
            for seed in SEEDS:
                yield PlannedTraining(task, name, reported[name], STEPS[1], seed)
        for seed in SEEDS:
            yield PlannedTraining(task, "plain", Perturbation(), STEPS[0], seed, "all", ("all",))
