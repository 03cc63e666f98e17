"""What real adapters answered, marked by us and by each suite's peer.

`outputs/<suite>.jsonl` holds them, malformed ones included; its README says whose they are. Of
programs it holds what evalplus keeps of them and whether that passed, but none of the tests: what
passes is compared where the data sets are (`TRANS_PEFT_DATA`).
"""

import ast
import json
import os
from pathlib import Path

import pytest

from tests.validation import metamath
from tests.validation.peers import PEERS, disagreements
from trans_peft.data import read_examples
from trans_peft.data.templates import TEMPLATES
from trans_peft.edges.file_store import FileStore
from trans_peft.validation.rules.program import extract
from trans_peft.validation.scoring import marker
from trans_peft.validation.suites import PUBLISHED, named

OUTPUTS = Path(__file__).parent / "outputs"
PROGRAMS = ("humaneval", "mbpp", "mbpp_plus")
DATA = os.environ.get("TRANS_PEFT_DATA", "")

SUITES = sorted(file.stem for file in OUTPUTS.glob("*.jsonl"))
METAMATH = {"gsm8k": metamath.gsm8k, "math": metamath.math_problem}
ELSEWHERE = {
    "gsm8k": {},
    "math": {("$\\sqrt{53}$", "\\sqrt{53}"): "a formula in dollar signs is the formula"},
}
"""What stands behind the marker, the reference, and why MetaMath marks that otherwise."""


def outputs(name):
    lines = (OUTPUTS / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_suite_has_a_peer_and_outputs():
    assert PEERS.keys() == PUBLISHED.keys()
    assert all(len(outputs(name)) >= 200 for name in SUITES)


@pytest.mark.parametrize("name", [name for name in SUITES if name not in PROGRAMS])
def test_real_outputs_are_marked_as_the_peer_marks_them(name):
    assert disagreements(name, marker(named(name)), outputs(name)) == []


@pytest.mark.parametrize("name", [name for name in SUITES if name in METAMATH])
def test_every_mark_that_metamath_gives_otherwise_has_a_reason(name):
    is_right, theirs = marker(named(name)), METAMATH[name]
    other = {
        (metamath.final(row["output"]), metamath.final(row["reference"]))
        for row in outputs(name)
        if is_right(row["output"], row["reference"]) != theirs(row["output"], row["reference"])
    }
    assert other == ELSEWHERE[name].keys()


@pytest.mark.parametrize("name", [name for name in SUITES if name in PROGRAMS])
def test_that_of_a_program_counts_which_evalplus_keeps(name):
    other = {
        (row["id"], row["by"])
        for row in outputs(name)
        if statements(extract(row["prompt"] + row["output"], row["names"]))
        != statements(row["sanitized"])
    }
    assert other == set()


def statements(program):
    """A program without its layout, its imports in front, where evalplus puts them."""
    try:
        body = ast.parse(program).body
    except SyntaxError:
        return program.strip()
    body.sort(key=lambda node: not isinstance(node, (ast.Import, ast.ImportFrom)))
    return [ast.dump(node) for node in body]


@pytest.mark.skipif(not DATA, reason="the tests of programs are in the data sets: TRANS_PEFT_DATA")
@pytest.mark.parametrize("name", [name for name in SUITES if name in PROGRAMS])
def test_what_evalplus_keeps_passes_where_the_answer_does(name):
    is_right, references = marker(named(name)), references_of(name)
    other = [
        (row["id"], row["by"])
        for row in outputs(name)
        if is_right(row["output"], references[row["id"]]) != row["passed"]
    ]
    assert other == []


def references_of(name):
    if name != "mbpp_plus":
        return {e.id: e.reference for e in read_examples(named(name, DATA).data, FileStore())}
    # Its own file was not to be had when the outputs were made: see their README.
    rows = map(json.loads, (Path(DATA) / PUBLISHED["mbpp"].file).open())
    read = [TEMPLATES[name](row | {"prompt": row["text"], "test_imports": []}) for row in rows]
    return {str(row["id"]): row["reference"] for row in read}
