"""How answers are compared: evalplus' tolerance for floats, and exceptions that are no answer."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trans_peft.sandbox.check import FailureReason, check_program
from trans_peft.sandbox.checker import _equal
from trans_peft.sandbox.limits import SandboxLimits
from trans_peft.validation.rules.program_tests import humaneval_tests, mbpp_tests

pytestmark = pytest.mark.usefixtures("all_guards")

LIMITS = SandboxLimits(wall_s=10, cpu_s=2)


def mbpp(program, *asserts, reference="def f(*args): pass"):
    return check_program(program, mbpp_tests(asserts, reference), limits=LIMITS)


def evalplus(answer, expected):
    """The comparison in `evalplus.eval.unsafe_execute` (0.3.1), with numpy."""
    import numpy

    def is_floats(value):
        if isinstance(value, (list, tuple)):
            return all(isinstance(item, float) for item in value)
        return isinstance(value, float)

    if answer == expected:
        return True
    if not is_floats(expected) or type(answer) is not type(expected):
        return False
    if isinstance(expected, (list, tuple)) and len(answer) != len(expected):
        return False
    return bool(numpy.allclose(answer, expected, rtol=1e-7, atol=1e-6))


@pytest.mark.parametrize(
    ("answer", "expected", "passes"),
    [
        ("2.5 + 1e-10", "2.5", True),
        ("2.5 - 9e-7", "2.5", True),
        ("2.5 + 2e-6", "2.5", False),
        ("4188.790204786391 + 4e-4", "4188.790204786391", True),
        ("4188.790204786391 + 5e-4", "4188.790204786391", False),
        ("[0.5, 1.5 + 1e-9]", "[0.5, 1.5]", True),
        ("(0.5, 1.5 + 1e-9)", "(0.5, 1.5)", True),
        ("[0.5, 1.5 + 1e-9]", "(0.5, 1.5)", False),
        ("[0.5]", "[0.5, 1.5]", False),
        ("[[0.5 + 1e-9]]", "[[0.5]]", False),
        ("[1, 0.5 + 1e-9]", "[1.0, 0.5]", True),
        ("[1, 0.5 + 1e-9]", "[1, 0.5]", False),
        ("3 + 1e-9", "3", False),
        ("3", "3.0", True),
        ("True", "1.0", True),
        ("float('nan')", "float('nan')", False),
        ("float('inf')", "float('inf')", True),
        ("1e308 * 10", "1e308", False),
        ("'2.5'", "2.5", False),
        ("None", "2.5", False),
    ],
)
def test_floats_are_compared_as_evalplus_compares_them(answer, expected, passes):
    program = f"def f():\n    return {answer}"
    assert mbpp(program, f"assert f() == {expected}").passed is passes
    assert mbpp(program, f"assert {expected} == f()").passed is passes
    assert evalplus(eval(answer), eval(expected)) is passes


floats = st.floats() | st.sampled_from(
    [0.0, 1.0, 1.0 + 1e-7, 1.0 + 2e-6, 1e6, 1e6 + 0.1, 1e6 + 0.2]
)
numbers = floats | st.integers(-3, 3)


@given(
    st.one_of(numbers, st.lists(numbers, max_size=3), st.lists(numbers, max_size=3).map(tuple)),
    st.one_of(numbers, st.lists(numbers, max_size=3), st.lists(numbers, max_size=3).map(tuple)),
    st.floats(-3e-6, 3e-6),
)
@settings(max_examples=200, deadline=None)
def test_floats_are_close_where_evalplus_accepts_them(first, second, step):
    near = first + step if isinstance(first, float) and math.isfinite(first) else first
    for answer, expected in ((first, second), (near, first), (first, near)):
        wanted = evalplus(answer, expected) if expected != [] else answer == expected
        assert bool(_equal(answer, expected, False)) is wanted
        assert bool(_equal(expected, answer, True)) is wanted


def test_only_an_assert_of_equality_is_tolerant():
    close = "def f(x):\n    return x + 1e-10"
    assert mbpp(close, "assert f(1.0) == 1.0 and f(2.0) == 2.0").passed
    assert mbpp(close, "for x in (0.5, 1.5):\n    assert f(x) == x, 'no'").passed
    for exact in (
        "assert (f(1.0) == 1.0) is True",
        "assert f(1.0) in [1.0]",
        "assert not f(1.0) != 1.0",
        "assert f(1.0) <= 1.0",
        "assert 0 < f(1.0) == 1.0",
    ):
        assert mbpp(close, exact).reason is FailureReason.WRONG
    wrong = mbpp(close, "x = 1\nassert f(1.0) == 1.1")
    assert "assert f(1.0) == 1.1" in wrong.detail


def test_floats_of_humaneval_are_compared_as_those_of_mbpp():
    """The paper scores both with evalplus."""
    test = "def check(candidate):\n    assert candidate(5) == 7.5\n"
    tests = humaneval_tests('def f(x):\n    """Half."""\n', test, "f")
    assert check_program("def f(x):\n    return 7.5 + 1e-10", tests, limits=LIMITS).passed
    assert not check_program("def f(x):\n    return 7.5 + 1e-5", tests, limits=LIMITS).passed


RAISED = [
    "StopIteration", "StopAsyncIteration", "GeneratorExit", "KeyboardInterrupt", "SystemExit",
    "AssertionError", "BaseException", "Exception", "IndexError", "KeyError", "AttributeError",
    "TypeError", "LookupError", "RecursionError", "EOFError", "OSError", "NotImplementedError",
    "UnicodeError", "Warning", "MemoryError", "Own", "OwnStop", "OwnBase",
    "FalseButEqual", "ExitsInStr", "ReturnsOddStr", "FalseName",
]  # fmt: skip
OWN = """
class Own(Exception): pass
class OwnStop(StopIteration): pass
class OwnBase(BaseException): pass
class FalseButEqual(Exception):
    def __eq__(self, other): return True
    def __bool__(self): return False
class ExitsInStr(StopIteration):
    def __str__(self): raise SystemExit(0)
class Text(str):
    def __getitem__(self, key): return self
class ReturnsOddStr(StopIteration):
    def __str__(self): return Text("x")
class Named(type):
    __name__ = property(lambda cls: "StopIteration")
class FalseName(Exception, metaclass=Named): pass
"""
LOOPS = [
    "assert all(map(f, [1, 2]))",
    "assert not any(map(f, [1, 2]))",
    "assert list(map(f, [1])) == []",
    "assert sum(map(f, [1])) == 0",
    "assert next(map(f, [1]), True)",
    "assert not [x for x in map(f, [1])]",
    "assert all(f(x) for x in [1, 2])",
    "assert list(iter(f, 5)) == []",
    "for x in map(f, [1]):\n    assert False",
    "assert sorted([2, 1], key=f) == [1, 2]",
    "assert dict(map(f, [1])) == {}",
]


@pytest.mark.parametrize("kind", RAISED)
def test_a_program_that_raises_does_not_pass(kind):
    program = f"{OWN}\ndef f(*args):\n    raise {kind}()"
    for test in (
        LOOPS
        if "Stop" in kind or kind in ("ReturnsOddStr", "ExitsInStr", "FalseName")
        else LOOPS[:4]
    ):
        result = mbpp(program, test)
        assert not result.passed, (test, result)
        assert result.reason in (FailureReason.RAISED, FailureReason.ENDED)


@pytest.mark.parametrize(
    "kind", ["StopIteration", "ExitsInStr", "KeyboardInterrupt", "FalseButEqual"]
)
def test_a_program_that_raises_while_it_loads_does_not_pass(kind):
    assert not mbpp(f"{OWN}\ndef f(*args): return 1\nraise {kind}()", LOOPS[0]).passed


def test_tests_can_expect_an_exception():
    """This works for Python's own exception types."""
    test = "try:\n    f(1)\n    assert 0\nexcept ValueError as error:\n    assert 'x' in str(error)"
    assert mbpp("def f(x):\n    raise ValueError('x')", test).passed
    assert not mbpp("def f(x):\n    raise KeyError('x')", test).passed


FALSE_EQUALITY = """
class EqualToAll:
    def __eq__(self, other): return True
    def __bool__(self): return True
    def __iter__(self): return iter(())
class Number(float):
    def __eq__(self, other): return True
    def __sub__(self, other): return 0.0
    def __rsub__(self, other): return 0.0
    def __abs__(self): return 0.0
class Whole(int):
    def __eq__(self, other): return True
class Word(str):
    def __eq__(self, other): return True
class Many(list):
    def __eq__(self, other): return True
    def __len__(self): return 1
"""


@pytest.mark.parametrize(
    "answer",
    ["EqualToAll()", "Number(9)", "Whole(9)", "Word('9')", "Many([9.0])", "[EqualToAll()]",
     "[Number(9)]"],
)  # fmt: skip
@pytest.mark.parametrize("expected", ["1.5", "[1.5]", "1", "'x'"])
def test_an_answer_with_its_own_equality_does_not_pass(answer, expected):
    program = f"{FALSE_EQUALITY}\ndef f(): return {answer}"
    assert not mbpp(program, f"assert f() == {expected}").passed
