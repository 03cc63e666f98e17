"""Suites that name a task of lm-evaluation-harness, before and after pinning."""

import dataclasses

import pytest
import yaml
from pydantic import TypeAdapter

from trans_peft.cli.files import read_suites
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.harness_task import HarnessTask
from trans_peft.errors import InvalidSpecError

TASK = HarnessTask("gsm8k", "exact_match,strict-match", num_fewshot=5)
PINNED = Suite(
    "sums",
    DataSource("s3://data/suites/sums.jsonl", "a" * 64),
    scoring="harness_match:{}",
    harness=dataclasses.replace(TASK, version="0.4.13", config_sha256="c" * 64),
)


def test_a_file_names_the_task_and_no_data(tmp_path):
    fields = {
        "name": "sums",
        "harness": {"task": "gsm8k", "metric": "exact_match,strict-match", "num_fewshot": 5},
        "limit": 200,
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(fields))
    (suite,) = read_suites([tmp_path / "suite.yaml"])
    assert suite == Suite("sums", harness=TASK, limit=200)
    (tmp_path / "suite.yaml").write_text(
        yaml.safe_dump({"name": "sums", "harness": {"tasks": "x"}})
    )
    with pytest.raises(InvalidSpecError, match=r"(?s)harness\.tasks: there is no .* first: task"):
        read_suites([tmp_path / "suite.yaml"])
    kind = TypeAdapter(Suite)
    for one in (suite, PINNED):
        assert kind.validate_json(kind.dump_json(one)) == one  # as a parameter of a flow run


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("task", "arc_challenge"),
        ("metric", "acc"),
        ("num_fewshot", 4),
        ("version", "0.4.14"),
        ("config_sha256", "d" * 64),
    ],
)
def test_each_field_of_the_task_is_part_of_the_hash(field, value):
    other = dataclasses.replace(PINNED.harness, **{field: value})
    assert dataclasses.replace(PINNED, harness=other).suite_sha256 != PINNED.suite_sha256


def test_a_suite_that_is_not_pinned_has_no_hash():
    with pytest.raises(InvalidSpecError, match="pin_suites"):
        _ = Suite("sums", harness=TASK).suite_sha256


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "data is missing"),
        ({"harness": TASK, "data": DataSource("x.jsonl")}, "decides about data"),
        ({"harness": TASK, "scoring": "bleu"}, "decides about scoring"),
        ({"harness": TASK, "max_new_tokens": 4}, "decides about max_new_tokens"),
        ({"harness": TASK, "stop": ()}, "decides about stop"),
        ({"harness": TASK, "threshold": 50.0}, "decides about threshold"),
        ({"harness": TASK, "temperature": 1.0}, "decides about temperature"),
        ({"harness": PINNED.harness}, "data is not pinned"),
        ({"harness": PINNED.harness, "data": PINNED.data, "temperature": 1.0}, "temperature"),
    ],
)
def test_what_the_task_decides_cannot_be_set(fields, message):
    with pytest.raises(InvalidSpecError, match=message):
        Suite("sums", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": ""}, "task must be the name of a task"),
        ({"task": "arc easy"}, "task must be the name of a task"),
        ({"metric": "acc,a,b"}, "metric must be METRIC or METRIC,FILTER"),
        ({"metric": ""}, "metric must be"),
        ({"num_fewshot": -1}, "num_fewshot must lie in"),
        ({"num_fewshot": True}, "num_fewshot must lie in"),
        ({"version": "0.4.13"}, "belong together"),
    ],
)
def test_an_invalid_task_is_refused(fields, message):
    with pytest.raises(InvalidSpecError, match=message):
        HarnessTask(**({"task": "gsm8k", "metric": "acc"} | fields))
