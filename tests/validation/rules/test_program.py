"""The rule `code`: which part of an answer is the program, and which programs are right."""

import json

import pytest

from tests.validation.peers import disagreements
from trans_peft.errors import DataError, EvaluationError, InvalidSpecError
from trans_peft.sandbox.run import missing_guards
from trans_peft.validation.rules.program import PYTHON, code, extract

STUB = 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """Add them up."""\n'


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (STUB + "    return sum(xs)\n", ["total"]),
        (STUB + "\treturn sum(xs)\n", ["total"]),
        (STUB + "    return sum(xs)\n\nprint(total([1]))\n", ["total"]),
        (STUB + "    return sum(xs)\n\ndef other(x):\n    return (x", ["total"]),
        (STUB + "    return add(xs)\n\ndef add(xs):\n    return sum(xs)\n", ["total", "add"]),
        (STUB + "    return sum(xs)\n\ndef unused():\n    return 1\n", ["total"]),
        (STUB + "    return N\n\nN = M = 3\nP = 4\n", ["total", "N"]),
        (STUB + "\n```python\ndef total(xs):\n    return sum(xs)\n```\n", ["total"]),
        ("Sure, here it is.\n\ndef total(xs):\n    return sum(xs)\nHope it helps!", ["total"]),
        ("def total(xs):\n    pass\n\ndef total(xs):\n    return 1\n", ["total"]),
        ("@cache\ndef total(xs):\n    return swap(xs)\n\ndef swap(xs):\n    xs.sort()\n",
         ["total", "swap"]),
        ("class Sum:\n    x = 1\n\ndef total(xs):\n    return Sum.x\n", ["Sum", "total"]),
    ],
)  # fmt: skip
def test_the_definitions_of_the_names_are_kept(text, kept):
    program = extract(text, ["total"])
    names = [
        line.split()[1].split("(")[0].rstrip(":") if line.startswith(("def", "class")) else line[0]
        for line in program.splitlines()
        if line and not line.startswith((" ", "from", "@"))
    ]
    assert sorted(names) == sorted(kept)
    assert "pass" not in program


def test_a_complete_definition_is_preferred_to_an_earlier_stub():
    program = extract(STUB + "\n\ndef total(xs):\n    return 7\n", ["total"])
    assert "return 7" in program
    assert "Add them up" not in program


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("", ""),
        ("one line", ""),
        ("I cannot do that.\nSorry!", ""),
        ("x = 1\ny = 2", "x = 1\ny = 2"),
        ("def other():\n    return 1\n\nno more", "def other():\n    return 1"),
        ("\x00\n\x00", ""),
    ],
)
def test_without_the_names_all_python_code_is_kept(text, program):
    assert extract(text, ["total"]) == program


def test_many_broken_lines_are_searched_quickly():
    text = "def total(xs):\n    return (\n" + "  x = )\n" * 400
    assert extract(text, ["total"]) == ""


REFERENCE = json.dumps(
    {
        "prompt": STUB,
        "entry_point": "total",
        "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n",
    }
)
MBPP_REFERENCE = json.dumps(
    {
        "prompt": '"""\nAdd them up.\n"""\n',
        "test_list": ["assert total([1, 2]) == 3"],
        "reference": "def total(xs):\n    return sum(xs)",
        "setup": "",
    }
)


@pytest.fixture
def rule():
    """Return the rule. On a machine that lacks a guard, check the refusal and skip the test."""
    found = code(PYTHON)
    if missing_guards():
        with pytest.raises(EvaluationError, match="lacks guards"):
            found("    return 3\n", REFERENCE)
        pytest.skip("the rule refuses to run programs without all guards")
    return found


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("    return sum(xs)\n", True),
        ("    return sum(xs)\n\nassert False\n", True),
        ("    return 3\n", True),
        ("    return 4\n", False),
        ("    return su", False),
        ("    import os; os._exit(0)\n", False),
        ("", False),
    ],
)
def test_a_completion_is_right_if_it_passes_the_tests(rule, answer, right):
    assert rule(answer, REFERENCE) == (100 if right else 0)


def test_a_program_of_mbpp_is_right_if_it_passes_the_tests(rule):
    assert rule("def total(xs):\n    return sum(xs)\n", MBPP_REFERENCE) == 100
    assert rule("def total(xs):\n    return 0\n", MBPP_REFERENCE) == 0


@pytest.mark.parametrize("reference", ["{", "[]", "{}", '{"prompt": ""}', "return 3"])
def test_a_reference_without_tests_is_refused(reference):
    with pytest.raises(DataError):
        code(PYTHON)("", reference)


@pytest.mark.parametrize("setting", ["python2.7", f"{PYTHON}+walls", "", "network"])
def test_another_python_and_unknown_guards_are_refused(setting):
    with pytest.raises(InvalidSpecError, match=f"code:{PYTHON}, and after a"):
        code(setting)


def test_programs_get_the_score_of_the_reference_harness(rule):
    """`sanitized` is evalplus' output for each answer."""
    rows = [
        {"output": "    return sum(xs)\n\nprint(1)", "sanitized": STUB + "    return sum(xs)"},
        {"output": "    return max(xs)\n", "sanitized": STUB + "    return max(xs)"},
        {"output": "    return (\n", "sanitized": ""},
    ]
    rows = [row | {"reference": REFERENCE} for row in rows]
    assert disagreements("humaneval", rule, rows) == []
    assert [rule(row["output"], REFERENCE) for row in rows] == [100, 0, 0]


def test_a_program_needs_its_own_imports(rule):
    """The reference's imports serve the tests only, as in the reference harness."""
    reference = json.loads(MBPP_REFERENCE) | {
        "test_list": ["assert root(4) == 2"],
        "reference": "import math\ndef root(x):\n    return math.sqrt(x)",
    }
    without = "def root(x):\n    return math.sqrt(x)\n"
    rows = [
        {"output": text, "sanitized": text, "reference": json.dumps(reference)}
        for text in (without, f"import math\n{without}")
    ]
    assert disagreements("mbpp", rule, rows) == []
    assert [rule(row["output"], row["reference"]) for row in rows] == [0, 100]
