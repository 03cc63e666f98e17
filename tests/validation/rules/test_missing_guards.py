"""Which guards of the sandbox may be missing: those that the operator and the suite both name."""

import json
from dataclasses import replace
from itertools import combinations, product

import pytest

from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.errors import EvaluationError, InvalidSpecError
from trans_peft.sandbox.check import CodeResult, FailureReason
from trans_peft.sandbox.errors import SandboxFailedError
from trans_peft.sandbox.guards import Guard
from trans_peft.sandbox.runner import NamespaceRunner, select_runner
from trans_peft.validation.guards import guards_named
from trans_peft.validation.rules import program
from trans_peft.validation.rules.program import PYTHON
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
def allowed_guards(monkeypatch):
    """Return a function that runs the rule on a machine that lacks `missing`.

    It returns the guards that the runner was allowed to lack, or None if the rule refused to run.
    """

    def run(suites, operators, missing):
        allowed = []

        class Runner(NamespaceRunner):
            @property
            def missing(self):
                return dict.fromkeys(missing, "not on this machine")

            def check(self, program, tests, limits):
                allowed.append(self.allow_missing)
                return CodeResult(True, FailureReason.PASSED)

        monkeypatch.setattr(program, "select_runner", lambda may: select_runner(may, [Runner]))
        scoring = "+".join([f"code:{PYTHON}", *sorted(suites)])
        is_right = make_scorer(replace(SUITE, scoring=scoring), operators)
        try:
            assert is_right("    return 1\n", REFERENCE)
        except EvaluationError:
            assert not allowed
            return None
        return allowed[0]

    return run


def test_a_guard_may_be_missing_only_if_both_allow_it(allowed_guards):
    for suites, operators, missing in product(SETS, SETS, SETS):
        found = allowed_guards(suites, operators, missing)
        assert found == (suites & operators if missing <= suites & operators else None)


def test_a_suite_alone_disables_no_guard(allowed_guards):
    everything = frozenset(Guard)
    for guard in Guard:
        assert allowed_guards(everything, frozenset(), {guard}) is None
    assert allowed_guards(everything, frozenset(), set()) == frozenset()


def test_a_suite_can_demand_a_guard_that_the_operator_does_not(allowed_guards):
    assert allowed_guards(frozenset(), frozenset(Guard), {Guard.NETWORK}) is None


def test_a_refusal_names_the_settings_of_the_operator_and_of_the_suite(monkeypatch):
    runner = type("Runner", (NamespaceRunner,), {"missing": {Guard.NETWORK: "Permission denied"}})
    monkeypatch.setattr(program, "select_runner", lambda may: select_runner(may, [runner]))
    with pytest.raises(EvaluationError) as caught:
        program.code(f"{PYTHON}+user", ["user"])("    return 1\n", REFERENCE)
    assert "network: the program has no network" in str(caught.value)
    assert "network: Permission denied" in str(caught.value)
    assert "TRANS_PEFT_SANDBOX_MAY_LACK=network,user" in str(caught.value)
    assert f"code:{PYTHON}+network+user" in str(caught.value)
    assert "allow_missing" not in str(caught.value)


def test_an_empty_answer_is_refused_too_without_guards(monkeypatch):
    runner = type("Runner", (NamespaceRunner,), {"missing": {Guard.NETWORK: "Permission denied"}})
    monkeypatch.setattr(program, "select_runner", lambda may: select_runner(may, [runner]))
    with pytest.raises(EvaluationError, match="lacks guards"):
        program.code(PYTHON)("", REFERENCE)


def test_a_failure_of_the_sandbox_is_an_evaluation_error(monkeypatch):
    def fail(_):
        raise SandboxFailedError("the sandbox failed", found="a traceback")

    monkeypatch.setattr(program, "select_runner", fail)
    with pytest.raises(EvaluationError, match=r"(?s)the sandbox failed.*found:.*a traceback"):
        program.code(PYTHON)("    return 1\n", REFERENCE)


def test_a_guard_that_does_not_exist_is_refused():
    with pytest.raises(InvalidSpecError, match=r"(?s)no such guard.*system-calls.*firewall"):
        guards_named(["user", "firewall"])
    with pytest.raises(InvalidSpecError, match="cannot run programs with the suite's settings"):
        make_scorer(replace(SUITE, scoring=f"code:{PYTHON}+firewall"))
