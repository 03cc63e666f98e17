"""The tests of HumanEval's and MBPP's rows."""

import json

import pytest

from trans_peft.errors import DataError
from trans_peft.validation.rules.program import PYTHON, code
from trans_peft.validation.rules.program_tests import mbpp_tests


def test_the_names_of_an_mbpp_row_come_from_its_reference():
    tests = mbpp_tests(
        ["assert sum(10, 15) == 6", "assert set([sum(1, 1)]) == {1}", "assert math.isclose(1, 1)"],
        reference="import math\ndef sum(a, b):\n    set, unused = a, b\n    return 6",
    )
    assert (tests.names, tests.preamble) == (("sum",), "import math")


@pytest.mark.parametrize("test", ["assert g(1)", "assert f("])
def test_an_unusable_row_of_mbpp_is_refused(test):
    with pytest.raises(DataError):
        mbpp_tests([test], reference="def f(): pass")


def test_a_row_of_humaneval_that_is_not_python_is_refused():
    row = {"prompt": "", "entry_point": "f", "test": "assert ("}
    with pytest.raises(DataError, match="the tests are not Python"):
        code(PYTHON)("    return 1", json.dumps(row))
