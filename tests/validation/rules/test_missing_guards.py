"""Which guards of the sandbox may be missing: the worker's operator decides, never a suite."""

import json
from dataclasses import replace
from itertools import combinations, product

import pytest

from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.errors import EvaluationError, InvalidSpecError
from trans_peft.validation.rules import program
from trans_peft.validation.rules.program import PYTHON
from trans_peft.validation.sandbox.guards import Guard, guards_named
from trans_peft.validation.scoring import make_scorer

SUITE = Suite("programs", DataSource("rows.jsonl", "0" * 64))
REFERENCE = json.dumps(
    {
        "prompt": 'def f():\n    """Say 1."""\n',
        "test": "def check(c):\n    pass\n",
        "entry_point": "f",
    }
)
SETS = [
    frozenset(names)
    for size in (0, 1, 2)
    for names in combinations((Guard.USER, Guard.FILES, Guard.NETWORK), size)
]


@pytest.fixture
def runs(monkeypatch):
    """Return a function that tells with which guards missing a program would be run."""

    def run(suites, operators, missing):
        ran = []

        def check(*_, allow_missing, **__):
            ran.append(allow_missing)
            return type("Result", (), {"passed": True})

        monkeypatch.setattr(program, "check_code", check)
        monkeypatch.setattr(program, "missing_guards", lambda: dict.fromkeys(missing, "not here"))
        scoring = "+".join([f"code:{PYTHON}", *sorted(suites)])
        is_right = make_scorer(replace(SUITE, scoring=scoring), operators)
        try:
            assert is_right("    return 1\n", REFERENCE)
        except EvaluationError:
            assert not ran
            return None
        return ran[0]

    return run


def test_a_guard_is_missing_only_where_both_allow_it(runs):
    for suites, operators, missing in product(SETS, SETS, SETS):
        ran = runs(suites, operators, missing)
        assert ran == (suites & operators if missing <= suites & operators else None)


def test_a_suite_alone_switches_nothing_off(runs):
    everything = frozenset(Guard)
    for guard in Guard:
        assert runs(everything, frozenset(), {guard}) is None
    assert runs(everything, frozenset(), set()) == frozenset()


def test_a_suite_can_demand_what_the_operator_does_without(runs):
    assert runs(frozenset(), frozenset(Guard), {Guard.NETWORK}) is None


def test_a_guard_that_does_not_exist_is_refused():
    with pytest.raises(InvalidSpecError, match=r"(?s)no such guard.*system-calls.*firewall"):
        guards_named(["user", "firewall"])
    with pytest.raises(InvalidSpecError, match="cannot be run as the suite asks"):
        make_scorer(replace(SUITE, scoring=f"code:{PYTHON}+firewall"))
