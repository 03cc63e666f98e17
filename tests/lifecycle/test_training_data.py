"""Several data sources and held-out rows, from the recipe to the files of the training job."""

import json
from dataclasses import replace

import pytest

from tests.tiny import write_tiny_base
from trans_peft.bases.publish import publish
from trans_peft.data import parse_examples
from trans_peft.data.training_rows import read_training_rows
from trans_peft.domain.base import Upload
from trans_peft.domain.data import DataSource, TrainingSource
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.recipe import OptimizerSettings, TrainingRecipe
from trans_peft.domain.spec import AdapterSpec
from trans_peft.domain.validation import ValidationSettings
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.lifecycle.bases import ingest
from trans_peft.lifecycle.train import job_on, resolve_recipe, train
from trans_peft.training.events import TrainingMetrics, TrainingStarted, ValidationMetrics


def rows(path, count):
    lines = [
        json.dumps({"prompt": f"{path.stem} {n} is", "completion": " odd"}) for n in range(count)
    ]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def platform_and_recipe(tmp_path):
    platform = replace(memory_platform(tmp_path / "work"), store=FileStore())
    uri = str(tmp_path / "bases")
    publish(write_tiny_base(tmp_path / "base"), uri, family="tiny", version="v1", store=FileStore())
    ingest(Upload(uri), platform)
    suite = Suite("odd", DataSource(rows(tmp_path / "suite.jsonl", 4)), max_new_tokens=4)
    return platform, TrainingRecipe(
        adapter="odd",
        family="tiny",
        base_version="v1",
        data=(
            TrainingSource(rows(tmp_path / "first.jsonl", 12)),
            TrainingSource(rows(tmp_path / "second.jsonl", 50), weight=2.0, limit=4),
        ),
        suites=(suite,),
        spec=AdapterSpec("LORA", {"target_modules": ["q_proj"]}),
        optimizer=OptimizerSettings(epochs=1.5, batch_size=4, warmup_ratio=0.1),
        validation=ValidationSettings(share=0.1, every_steps=2),
    )


def test_every_source_is_pinned_and_becomes_a_file(platform_and_recipe):
    platform, recipe = platform_and_recipe
    resolved, base = resolve_recipe(recipe, platform)
    assert [len(source.sha256) for source in resolved.data] == [64, 64]
    assert [source.weight for source in resolved.data] == [1, 2]
    found = read_training_rows(resolved, platform.store)
    job = job_on(base, resolved, found, platform)
    job.check()
    written = [parse_examples(file.read_bytes(), "") for file in job.data_files]
    prompts = [[example.prompt for example in part] for part in (*written, found.validation)]
    assert sum(map(len, prompts)) == 16
    assert [len(part) for part in prompts] == [len(part) for part in (*found.sources, "ab")]
    assert {p.split()[0] for p in prompts[0]} == {"first"}
    assert {p.split()[0] for p in prompts[1]} == {"second"}
    held_out = parse_examples(job.validation_file.read_bytes(), "")
    assert [example.prompt for example in held_out] == prompts[2]


def test_rows_of_training_and_of_validation_are_compared_with_the_suites(
    platform_and_recipe, monkeypatch
):
    class ComparedError(Exception):
        pass

    def count(rows, suites, store):
        raise ComparedError(sorted(row.prompt for row in rows), [suite.name for suite in suites])

    platform, recipe = platform_and_recipe
    monkeypatch.setattr("trans_peft.lifecycle.train.count_leakage", count)
    found = read_training_rows(recipe, platform.store)
    assert len(found.validation) >= 1 and len(found.training) + len(found.validation) == 16
    with pytest.raises(ComparedError) as compared:
        train(recipe, platform, on_event=print)
    prompts = sorted(row.prompt for row in (*found.training, *found.validation))
    assert compared.value.args == (prompts, ["odd"])


@pytest.mark.slow  # starts a training process
def test_a_recipe_with_epochs_sources_and_validation_is_trained(platform_and_recipe):
    platform, recipe = platform_and_recipe
    events = []
    version = train(recipe, platform, on_event=events.append)
    assert version.recipe.optimizer.epochs == 1.5
    held_out = read_training_rows(version.recipe, platform.store).validation
    first = sum(example.prompt.startswith("first") for example in held_out)
    rows_per_epoch = 12 - first + 2 * (4 - (len(held_out) - first))
    steps = -(-1.5 * rows_per_epoch // 4)
    (started,) = [event for event in events if isinstance(event, TrainingStarted)]
    assert started.total_steps == steps
    assert started.epochs == pytest.approx(4 * steps / rows_per_epoch)
    assert sum(isinstance(event, TrainingMetrics) for event in events) == steps
    evaluated = [event.step for event in events if isinstance(event, ValidationMetrics)]
    assert evaluated == sorted({*range(2, int(steps) + 1, 2), steps})
