from pathlib import Path

import pytest

from trans_peft.data import Example, write_examples
from trans_peft.domain.adapter import AdapterSpec
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.recipe import OptimizerSettings, Perturbation, TrainingRecipe
from trans_peft.training.job import TrainingJob

EXAMPLES = tuple(
    Example(str(i), f"What is {i} plus {i}? " * (1 + i % 3), f"It is {2 * i}.") for i in range(20)
)


def recipe(
    *,
    dropout: float = 0.0,
    masking_p: float = 0.0,
    dropping_p: float = 0.0,
    processes: int = 1,
    checkpoint_steps: int = 3,
    **optimizer,
) -> TrainingRecipe:
    return TrainingRecipe(
        adapter="sums",
        family="tiny",
        data=DataSource("rows.jsonl"),
        suites=(Suite("sums", DataSource("rows.jsonl")),),
        spec=AdapterSpec(
            "LORA",
            {
                "r": 4,
                "lora_alpha": 8,
                "lora_dropout": dropout,
                "target_modules": ["q_proj", "v_proj", "down_proj"],
            },
        ),
        perturbation=Perturbation(masking_p=masking_p, dropping_p=dropping_p),
        optimizer=OptimizerSettings(
            **{"learning_rate": 1e-2, "steps": 8, "batch_size": 2, "warmup_steps": 2} | optimizer
        ),
        processes=processes,
        checkpoint_steps=checkpoint_steps,
    )


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(EXAMPLES, tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="session")
def make_job(tiny_base: Path, data_file: Path):
    def make(work_dir: Path, recipe: TrainingRecipe) -> TrainingJob:
        return TrainingJob(recipe, tiny_base, "s3://bases/tiny/v1", "f00d", data_file, work_dir)

    return make


@pytest.fixture(scope="session")
def uninterrupted(make_job, tmp_path_factory):
    """A run that nothing disturbs, of the recipe `runs.PERTURBED`."""
    from tests.training.runs import PERTURBED, run

    return run(make_job(tmp_path_factory.mktemp("uninterrupted"), PERTURBED))


@pytest.fixture
def short_run(make_job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that trains by a recipe: `tests.training.short_runs.short_run`."""
    from tests.training import short_runs
    from trans_peft.training import finetune

    # `test_adapter_check` tests the check, which takes as long as a short run.
    monkeypatch.setattr(finetune, "check_adapter_is_trainable", lambda *_: None)
    return lambda recipe: short_runs.short_run(make_job(tmp_path, recipe))
