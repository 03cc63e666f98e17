"""The rows of a recipe: sources in order, their limits, and rows that are held out."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from trans_peft.data.training_rows import read_training_rows
from trans_peft.domain.data import DataSource, TrainingSource
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.domain.validation import ValidationSettings
from trans_peft.edges.file_store import FileStore
from trans_peft.errors import DataError, InvalidSpecError

STORE = FileStore()


def written(path: Path, prompts) -> str:
    rows = [{"prompt": f"{prompt} = ", "completion": str(n)} for n, prompt in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe(*sources, **fields) -> TrainingRecipe:
    return TrainingRecipe("a", "f", sources, (Suite("s", DataSource("s.jsonl")),), **fields)


def prompts(examples) -> list[str]:
    return [example.prompt.removesuffix(" = ") for example in examples]


@pytest.fixture
def files(tmp_path):
    first = written(tmp_path / "first.jsonl", [f"a{n % 80}" for n in range(100)])
    return first, written(tmp_path / "second.jsonl", [f"b{n}" for n in range(20)])


def test_sources_are_read_in_order_up_to_their_limits(files):
    rows = read_training_rows(
        recipe(TrainingSource(files[1], limit=2), TrainingSource(files[0], limit=3)), STORE
    )
    assert [prompts(source) for source in rows.sources] == [["b0", "b1"], ["a0", "a1", "a2"]]
    assert prompts(rows.training) == ["b0", "b1", "a0", "a1", "a2"]
    assert rows.validation == ()


def test_one_source_is_a_list_of_one(files):
    single = replace(recipe(TrainingSource(files[1])), data=DataSource(files[1]))
    assert read_training_rows(single, STORE) == read_training_rows(
        recipe(TrainingSource(files[1])), STORE
    )


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_a_share_of_the_prompts_is_held_out(files, share):
    sources = tuple(map(TrainingSource, files))
    wanted = recipe(*sources, validation=ValidationSettings(share=share))
    rows = read_training_rows(wanted, STORE)
    least = math.ceil(share * 120)
    assert least <= len(rows.validation) <= least + 1, "20 prompts have two rows"
    assert len(rows.training) + len(rows.validation) == 120
    assert not set(prompts(rows.training)) & set(prompts(rows.validation))
    other = replace(recipe(*reversed(sources), validation=wanted.validation), seed=7)
    again = read_training_rows(other, STORE)
    assert sorted(prompts(again.validation)) == sorted(prompts(rows.validation))


def test_a_share_that_leaves_no_training_row_is_refused(tmp_path):
    file = written(tmp_path / "one.jsonl", ["same"] * 10)
    wanted = recipe(TrainingSource(file), validation=ValidationSettings(share=0.1))
    with pytest.raises(DataError, match=r"share=0.1 leaves no row for training in .*one.jsonl"):
        read_training_rows(wanted, STORE)


def test_validation_rows_of_a_file_are_not_trained_on(files, tmp_path):
    held_out = written(tmp_path / "held-out.jsonl", ["c1", "c2"])
    settings = ValidationSettings(data=DataSource(held_out))
    rows = read_training_rows(recipe(TrainingSource(files[0]), validation=settings), STORE)
    assert prompts(rows.validation) == ["c1", "c2"]
    assert len(rows.training) == 100
    written(tmp_path / "held-out.jsonl", ["c1", "a7"])
    with pytest.raises(DataError, match=r"1 of 2 rows of .* have the prompt of a training row"):
        read_training_rows(recipe(TrainingSource(files[0]), validation=settings), STORE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0}, "weight must be above 0 and at most 1,000, not 0"),
        ({"weight": 1001}, "weight must be above 0"),
        ({"weight": True}, "weight must be above 0"),
        ({"limit": 0}, "limit must be a whole number from 1, or null, not 0"),
        ({"limit": 1.5}, "limit must be a whole number"),
    ],
    ids=str,
)
def test_a_source_out_of_range_is_refused(settings, message):
    with pytest.raises(InvalidSpecError, match=message):
        TrainingSource("a.jsonl", **settings)


@pytest.mark.parametrize(
    ("sources", "fields", "message"),
    [
        ((), {}, "data must name at least one source"),
        (("a", "b", "a"), {}, "data names a source twice"),
    ],
)
def test_sources_that_contradict_each_other_are_refused(sources, fields, message):
    with pytest.raises(InvalidSpecError, match=message):
        recipe(*map(TrainingSource, sources), **fields)


def test_packed_rows_have_no_weights():
    weighted = recipe(TrainingSource("a"), TrainingSource("b", weight=2))
    with pytest.raises(InvalidSpecError, match="every weight must be 1"):
        replace(weighted, packing=True)


def test_a_change_of_sources_reaches_every_source():
    settings = ValidationSettings(data=DataSource("v"))
    changed = recipe(
        TrainingSource("a", weight=2), TrainingSource("b", limit=3), validation=settings
    ).with_sources(lambda source: source.pinned(source.uri * 2))
    assert changed.data == (TrainingSource("a", "aa", weight=2), TrainingSource("b", "bb", limit=3))
    assert changed.validation.data == DataSource("v", "vv")
    single = replace(changed, data=DataSource("c"), validation=None)
    assert single.with_sources(lambda source: source.pinned("cc")).data == DataSource("c", "cc")
