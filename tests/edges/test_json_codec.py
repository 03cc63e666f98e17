"""What is stored as JSON reads back, and older code reads it where it uses no field of newer code.

The older code is a class without the fields that were added later, which refuses unknown fields.
"""

import json
from dataclasses import fields, is_dataclass, make_dataclass, replace
from typing import Any

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st
from pydantic import TypeAdapter

from tests.edges import examples
from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Evaluation, GatePolicy, Suite
from trans_peft.domain.harness_task import HarnessTask
from trans_peft.domain.judge_model import JudgeModel
from trans_peft.domain.optimizer import OptimizerSettings
from trans_peft.domain.outcome import TransferOutcome
from trans_peft.domain.privacy import PrivacySettings
from trans_peft.domain.recipe import SyntheticPrompts, TrainingRecipe
from trans_peft.domain.recovery import CompensationPolicy, DistillationPolicy, RecoveryPolicy
from trans_peft.edges.json_codec import from_json, to_json
from trans_peft.errors import InvalidSpecError

DATA = DataSource("s3://data/x.jsonl", "ab" * 32)
JUDGE = JudgeModel("s3://bases/judge", "{prompt}{answer}", (" no", " yes"), (0, 1), DATA)
DATA_FIELDS = {"template": "commonsense", "cluster": "author", "slice": "language"}
SUITES = {"chance_points": 25.0, "temperature": 0.7, "top_p": 0.9, "samples": 4, "sampling_seed": 1}
OPTIMIZERS = {
    "epochs": 2.0, "warmup_ratio": 0.1, "schedule": "linear", "name": "adamw_8bit",
    "betas": (0.9, 0.95), "epsilon": 1e-6, "loraplus_lr_ratio": 4.0, "neftune_alpha": 5.0,
}  # fmt: skip
POLICIES = {
    "sequential": True, "label": "b", "max_negative_flip_points": 2.0, "max_leakage_points": 1.0,
    "required_slices": ("exceptions/German",), "recovery": RecoveryPolicy((0.5,)),
}  # fmt: skip
RECIPES = {
    "data_seed": 7, "synthetic_prompts": SyntheticPrompts(DATA), "objective": "dpo",
}  # fmt: skip
RECOVERIES = {"compensation": CompensationPolicy(), "distillation": DistillationPolicy(beta=0.5)}
RECIPE = TrainingRecipe("chat", "small", DATA, (examples.SUITE,))

PLAIN = {
    "data": (DATA, DATA_FIELDS),
    "suite": (examples.SUITE, SUITES),
    "optimizer": (OptimizerSettings(), OPTIMIZERS),
    "policy": (GatePolicy(), POLICIES),
    "recipe": (RECIPE, RECIPES),
    "recovery": (RecoveryPolicy(), RECOVERIES),
    "prompts": (SyntheticPrompts(steps=3), {"privacy": PrivacySettings(8.0)}),
}
"""A value without later fields, and a value of each later field."""


@st.composite
def values(draw):
    """Draw a value of PLAIN with some of its later fields set."""
    value, later = PLAIN[draw(st.sampled_from(sorted(PLAIN)))]
    chosen = {name: later[name] for name in draw(st.sets(st.sampled_from(sorted(later))))}
    if "epochs" in chosen:
        chosen["steps"] = None
    try:
        return replace(value, **chosen)
    except InvalidSpecError:  # fields that exclude each other
        reject()


def before(kind):
    """Return the class as it was before fields were added to it."""
    kept = [field.name for field in fields(kind) if not field.metadata.get("added_later")]
    return make_dataclass(
        kind.__name__,
        [(name, Any) for name in kept],
        namespace={"__pydantic_config__": FORBID_EXTRA_FIELDS},
    )


def dumped(value):
    """Return the value as pydantic dumps it, with all fields."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def without_later_defaults(value, whole):
    """Return what pydantic dumped, without later fields that have their defaults."""
    if is_dataclass(value):
        return {
            field.name: without_later_defaults(getattr(value, field.name), whole[field.name])
            for field in fields(value)
            if not field.metadata.get("added_later") or getattr(value, field.name) != field.default
        }
    if isinstance(value, tuple):
        return [without_later_defaults(*both) for both in zip(value, whole, strict=True)]
    return whole


@given(values())
def test_what_is_written_reads_back_and_is_what_pydantic_dumps_without_later_defaults(value):
    text = to_json(value)
    assert from_json(type(value), text, where="a test") == value
    assert json.loads(text) == without_later_defaults(value, dumped(value))


@given(values())
def test_newer_code_reads_what_older_code_wrote_with_all_fields(value):
    assert from_json(type(value), json.dumps(dumped(value)), where="a test") == value


@pytest.mark.parametrize("name", PLAIN)
def test_older_code_reads_a_value_without_later_fields(name):
    value, _ = PLAIN[name]
    read = TypeAdapter(before(type(value))).validate_json(to_json(value))
    assert {field.name for field in fields(read)} == json.loads(to_json(value)).keys()


@pytest.mark.parametrize(
    "suite",
    [
        Suite("marked", DATA, scoring="judge", judge=JUDGE),
        Suite("task", harness=HarnessTask("arc_easy", "acc")),
    ],
    ids=["judge", "harness"],
)
def test_nested_values_of_a_suite_read_back(suite):
    assert from_json(Suite, to_json(suite), where="a test") == suite


def test_objects_without_later_fields_are_written_as_before(tmp_path):
    source = examples.draft("chat", "small", examples.peft_folder(tmp_path / "adapter"))
    outcome = examples.outcome(source)
    for value in (
        examples.evaluation("1" * 64),
        examples.fingerprint(),
        replace(outcome, training=None),
    ):
        assert json.loads(to_json(value)) == dumped(value)
    assert from_json(TransferOutcome, to_json(outcome), where="a test") == outcome
    degrees = replace(outcome.evaluations[0].items[0], correct=1.0)
    graded = replace(outcome.evaluations[0], items=(degrees,))
    assert from_json(Evaluation, to_json(graded), where="a test").has_degrees
