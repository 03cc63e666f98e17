"""Errors of evaluation and registration are raised before the first training step."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.tiny import tiny_model, write_tiny_base
from trans_peft.bases.publish import publish
from trans_peft.domain.adapter import AdapterSpec
from trans_peft.domain.base import Upload
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.recipe import OptimizerSettings, SyntheticPrompts, TrainingRecipe
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.errors import DataError, InvalidSpecError, NotFoundError, StoreError
from trans_peft.lifecycle.adopt import adopt
from trans_peft.lifecycle.bases import ingest
from trans_peft.lifecycle.train import train

FAMILY = "tiny"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    platform = replace(memory_platform(root / "work"), store=FileStore())
    for family in (FAMILY, "other"):
        uri = str(root / "bases" / family)
        publish(write_tiny_base(root / family), uri, family=family, version="v1", store=FileStore())
        ingest(Upload(uri), platform)
    torch.manual_seed(1)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), config).save_pretrained(root / "lora")
    return platform, root


def rows(path, **changes):
    path.write_text(
        "\n".join(
            json.dumps({"id": f"{i}", "prompt": f"{i} is", "completion": " odd"} | changes)
            for i in range(4)
        )
    )
    return DataSource(str(path))


def chat_without_end(path):
    messages = [{"role": "user", "content": "x" * 600}, {"role": "assistant", "content": "y"}]
    path.write_text(json.dumps({"id": "1", "messages": messages}))
    return DataSource(str(path))


SUITES = {
    "a rule, misspelt": (rows, {"scoring": "exact_mach"}, InvalidSpecError, "exact_mach"),
    "a rule's expression": (rows, {"scoring": "regex:(("}, InvalidSpecError, "regex"),
    "no choices": (rows, {"scoring": "choice"}, DataError, "no choices"),
    "a prompt too long": (
        lambda path: rows(path, prompt="x" * 600),
        {},
        DataError,
        "the context is 512",
    ),
    "a chat too long": (chat_without_end, {}, DataError, "the context is 512"),
    "an answer too long": (rows, {"max_new_tokens": 600}, DataError, "the context is 512"),
    "a prompt of white space": (
        lambda path: rows(path, prompt="", completion="x"),
        {},
        DataError,
        "(?i)prompt",
    ),
    "a rule that cannot read the references": (
        rows,
        {"scoring": "json_equal"},
        DataError,
        "not JSON",
    ),
    "an id twice": (lambda path: rows(path, id="0"), {}, DataError, "id"),
    "no file": (lambda path: DataSource(str(path)), {}, NotFoundError, "eval"),
}


@pytest.mark.parametrize("verb", ["train", "adopt"])
@pytest.mark.parametrize("case", SUITES)
def test_a_suite_that_cannot_be_evaluated_fails_before_training(
    case, verb, place, tmp_path, monkeypatch
):
    make, changes, error, message = SUITES[case]
    suite = Suite("exam", make(tmp_path / "eval.jsonl"), **({"max_new_tokens": 4} | changes))
    with pytest.raises(error, match=f"(?s){message}"):
        run(verb, place, tmp_path, monkeypatch, suites=(suite,))


def test_problems_of_all_suites_are_reported_together(place, tmp_path, monkeypatch):
    suites = (
        Suite("first", rows(tmp_path / "a.jsonl"), scoring="exact_mach"),
        Suite("second", rows(tmp_path / "b.jsonl", prompt="x" * 600)),
    )
    with pytest.raises(DataError, match=r"(?s)2 of 2 suites.*exact_mach.*the context is 512"):
        run("train", place, tmp_path, monkeypatch, suites=suites)


@pytest.mark.parametrize("name", ["team/sql", "a:b", "", "../x", "x" * 101, "sérum", "a b"])
def test_an_invalid_name_fails_before_training(name, place, tmp_path, monkeypatch):
    with pytest.raises(InvalidSpecError, match="adapter"):
        run("adopt", place, tmp_path, monkeypatch, adapter=name)
    with pytest.raises(InvalidSpecError, match="adapter"):
        run("train", place, tmp_path, monkeypatch, adapter=name)


@pytest.mark.parametrize("verb", ["train", "adopt"])
def test_an_adapter_of_another_family_fails_before_training(verb, place, tmp_path, monkeypatch):
    platform, root = place
    suite = Suite("exam", rows(tmp_path / "taken.jsonl"), max_new_tokens=4)
    adopt("taken", str(root / "lora"), "other", [suite], platform, base_version="v1")
    with pytest.raises(InvalidSpecError, match="belongs to another family"):
        run(verb, place, tmp_path, monkeypatch, adapter="taken")
    with pytest.raises(InvalidSpecError, match="case"):
        run(verb, place, tmp_path, monkeypatch, adapter="Taken", family="other")


@pytest.mark.parametrize("verb", ["train", "adopt"])
def test_an_unwritable_folder_fails_before_training(verb, place, tmp_path, monkeypatch):
    platform, root = place
    (tmp_path / "file").touch()
    broken = replace(platform, work_dir=tmp_path / "file")
    with pytest.raises(StoreError, match="cannot write"):
        run(verb, (broken, root), tmp_path, monkeypatch)


def run(verb, place, tmp_path, monkeypatch, *, adapter="mine", family=FAMILY, suites=None):
    """Train or adopt; loading a model or training fails the test."""

    def forbidden(*_, **__):
        raise AssertionError("that takes hours")

    platform, root = place
    monkeypatch.setattr("trans_peft.lifecycle.train.fit", forbidden)
    monkeypatch.setattr("trans_peft.models.load_base", forbidden)
    suites = suites or (Suite("exam", rows(tmp_path / "eval.jsonl"), max_new_tokens=4),)
    if verb == "adopt":
        return adopt(adapter, str(root / "lora"), family, suites, platform, base_version="v1")
    recipe = TrainingRecipe(
        adapter=adapter,
        family=family,
        base_version="v1",
        data=rows(tmp_path / "train.jsonl"),
        suites=suites,
        spec=AdapterSpec("LORA", {"target_modules": ["q_proj"]}),
        optimizer=OptimizerSettings(steps=2),
    )
    return train(recipe, platform, on_event=lambda event: None)


def test_invalid_approved_prompts_are_refused_before_training(place, tmp_path):
    platform, _ = place
    data = rows(tmp_path / "rows.jsonl")
    recipe = TrainingRecipe(
        adapter="approved",
        family=FAMILY,
        base_version="v1",
        data=data,
        suites=(Suite("parity", data),),
        synthetic_prompts=SyntheticPrompts(rows(tmp_path / "approved.jsonl", prompt=" ")),
    )
    with pytest.raises(DataError, match=r"approved.jsonl: 4 rows are no prompts"):
        train(recipe, platform, on_event=lambda event: None)
    with pytest.raises(NotFoundError, match="absent"):
        absent = DataSource(str(tmp_path / "absent.jsonl"))
        recipe = replace(recipe, synthetic_prompts=SyntheticPrompts(absent))
        train(recipe, platform, on_event=lambda event: None)
