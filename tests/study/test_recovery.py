"""What `python -m study.recovery` hands to the command line is what it means."""

import json
from pathlib import Path

from study import recovery
from study.fleet import KINDS, STOP, recipe
from trans_peft.cli.files import read_policy, read_recipe, read_suites
from trans_peft.domain.evaluation import GatePolicy


def test_its_files_are_read_as_the_adapter_s_recipe_and_a_policy_with_remedies(tmp_path):
    rows = {name: Path(f"/rows/{name}.jsonl") for name in ("train", "eval")}
    given = {}
    for name, value in recovery.files(rows).items():
        given[name] = tmp_path / f"{name}.json"
        given[name].write_text(json.dumps(value))

    (asked,) = read_suites([given["suite"]])
    assert (asked.data.uri, asked.limit, asked.stop) == ("/rows/eval.jsonl", 120, STOP)
    read = read_recipe(given["recipe"])
    assert (read.data.uri, read.suites) == ("/rows/train.jsonl", (asked,))
    assert read.spec == KINDS[recovery.KIND].spec
    assert read.optimizer == recipe(recovery.KIND, recovery.SEED).optimizer
    policy = read_policy(given["policy"])
    assert policy.recovery.retune_steps == 20
    assert policy.margin_points == GatePolicy().margin_points
