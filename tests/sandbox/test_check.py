"""Programs and their tests in two sandboxes: the same verdicts as in one interpreter."""

import pytest

from tests.sandbox.programs import LIMITS, SHORT_WALL_LIMIT
from trans_peft.sandbox.check import CodeTests, FailureReason, check_program
from trans_peft.sandbox.errors import InvalidLimitsError, InvalidTestsError
from trans_peft.sandbox.limits import SandboxLimits
from trans_peft.validation.rules.program_tests import humaneval_tests, mbpp_tests

PROMPT = 'def area(a, b):\n    """Return a times b."""\n'
TESTS = humaneval_tests(
    PROMPT,
    "def check(candidate):\n"
    "    assert candidate(2, 3) == 6\n"
    "    assert candidate(2, b=[1]) == [1, 1]\n"
    "    assert abs(candidate(0.1, 3) - 0.3) < 1e-6\n",
    "area",
)


@pytest.mark.usefixtures("all_guards")
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return a * b", FailureReason.PASSED),
        ("import math; return math.prod([a]) * b", FailureReason.PASSED),
        ("print(a); return a * b", FailureReason.PASSED),
        ("return a + b", FailureReason.WRONG),
        ("return a * b if isinstance(b, int) else None", FailureReason.WRONG),
        ("return 1 / 0", FailureReason.RAISED),
        ("assert False", FailureReason.RAISED),
        ("return area(a, b)", FailureReason.RAISED),
        ("return (", FailureReason.RAISED),
        ("import time; time.sleep(60)", FailureReason.TIMED_OUT),
    ],
)
def test_ordinary_programs_get_the_verdict_of_one_interpreter(body, reason):
    program = f"{PROMPT}    {body}\n"
    limits = SHORT_WALL_LIMIT if reason is FailureReason.TIMED_OUT else LIMITS
    result = check_program(program, TESTS, limits=limits)
    assert result.reason is reason, result
    if reason is not FailureReason.TIMED_OUT:
        assert result.passed == passes_in_one_interpreter(program, TESTS)


def passes_in_one_interpreter(program: str, tests: CodeTests) -> bool:
    namespace: dict[str, object] = {}
    try:
        exec(program, namespace)
        exec(tests.tests, namespace)
    except Exception:
        return False
    return True


@pytest.mark.usefixtures("all_guards")
def test_a_failure_quotes_the_failed_line():
    result = check_program(f"{PROMPT}    return 6\n", TESTS, limits=LIMITS)
    assert "assert candidate(2, b=[1])" in result.detail


MBPP_TREE = mbpp_tests(
    ["assert depth(root) == 2", "assert set(labels(root)) == {1, 2}"],
    reference="import sys\nclass Node: pass\ndef depth(n): pass\ndef labels(n): pass",
    setup="root = Node(1)\nroot.left = Node(2)",
)
TREE = """
class Node:
    def __init__(self, label):
        self.label, self.left = label, None
def depth(n):
    return 1 + depth(n.left) if n else 0
def labels(n):
    return [n.label, *labels(n.left)] if n else []
"""


@pytest.mark.usefixtures("all_guards")
def test_tests_use_objects_of_the_program_by_reference():
    assert MBPP_TREE.names == ("Node", "depth", "labels")
    assert check_program(TREE, MBPP_TREE, limits=LIMITS).passed


@pytest.mark.parametrize(
    "make",
    [
        lambda: CodeTests("assert (", ("f",)),
        lambda: CodeTests("assert True", ()),
        lambda: CodeTests("assert True", ("f",), preamble="import"),
    ],
)
def test_unusable_tests_are_refused(make):
    with pytest.raises(InvalidTestsError):
        make()


def test_invalid_limits_are_reported_at_once():
    with pytest.raises(InvalidLimitsError, match=r"wall_s.*memory_bytes"):
        SandboxLimits(wall_s=0, memory_bytes=1)
