# ruff: noqa: E501
"""The longest stretch that is Python: equal to a search through all stretches, and fast."""

import ast
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trans_peft.validation.rules.longest_python import longest_python
from trans_peft.validation.rules.program import extract


def exhaustive(lines: list[str]) -> str:
    """Return the stretch of two lines or more with the most that are not blank; the first such."""
    best, stretch = 0, ""
    for start, line in enumerate(lines):
        if line[:1].isspace() and line.strip() and not line.lstrip().startswith("#"):
            continue  # an indented line opens no program
        filled = sum(bool(other.strip()) for other in lines[start:])
        for end in range(len(lines), start + 1, -1):
            if filled <= best:
                break
            if lines[end - 1].strip():
                candidate = "\n".join(lines[start:end])
                if _parsed(candidate) is not None:
                    best, stretch = filled, candidate
                    break
                filled -= 1
    return stretch


def _parsed(text: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes are the author's
        try:
            return ast.parse(text)
        except (MemoryError, RecursionError, SyntaxError, ValueError):
            return None


LINES = (
    "", "", " ", "    ", "x = 1", "y = x", "    x = 1", "        y = 2", "def f(a):", "def g():",
    "    return 1", "    return (", "        return f(", "    )", ")", "(", "x = (", "x = [", "]", "}",
    "x = {", "if x:", "    if x:", "else:", "    else:", "try:", "    try:", "    pass", "        pass",
    "except E:", "    except E:", "finally:", "class A:", "    def m(self):", "@d", "    @d", "@d(1)",
    "@ b", '"""', '"""doc"""', "'''", 'x = """', '    """doc', 'text """ more', "# comment:",
    "    # comment", "#", "Sure, here it is:", "Hope it helps!", "```python", "```", "it's", "x = 1 \\",
    "\\", "x = 1,", "x: int", "lambda:", "print(1)", "f(", "  x = )", "for i in x:", "while x:",
    "    break", "async def f():", "    await x", "match x:", "    case 1:", "        pass", "$", "?",
    "x = 1  # note:", "x = 'a:'", "\x0c", "\xa0", "\x00", "x = 1\r", "x\ry", "\r", "\ufeffx = 1",
    'f"{', 'f"""{', "x = 1;", "x = 1; y = (", "import os", "from a import (", "    b,", "del x",
    "return", "global x", "x := 1", "x = yield", "1 +", "*a, = b", "with a as b, (", "    yield",
    "(" * 50, ")" * 50, "-" * 30 + "1", "not " * 20 + "x", "a b", "def f(a, a):", "f(a=1, 2)",
)  # fmt: skip

programs = st.lists(st.sampled_from(LINES), max_size=14)
BLOCKS = (
    ["def f(x):", "    if x:", "        return 1", "", "    return 2", ""],
    ["x = [", "1,", "", "2,", "]"],
    ['"""', "free text", "def inside():", "    return 1", '"""'],
    ["@d", "@d(1)", "class A:", "    # comment", "    def m(self):", "        pass"],
    ["try:", "    f()", "except E:", "    pass"],
    ["Sure, here it is:", "```python", "def f():", "    return 1", "```", "Hope it helps."],
    ["x = 1 \\", "  + 2", "y = 3"],
)
mixtures = st.lists(
    st.sampled_from(BLOCKS) | st.sampled_from(LINES).map(lambda line: [line]), max_size=7
).map(lambda blocks: [line for block in blocks for line in block])


@settings(max_examples=600, deadline=None)
@given(programs | mixtures)
def test_the_result_is_that_of_an_exhaustive_search(lines):
    assert longest_python(lines) == exhaustive(lines)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab=():\"'\\# \n\n\n\t.,@\r\x0c[]", max_size=60))
def test_the_result_is_that_of_an_exhaustive_search_for_any_text(text):
    assert longest_python(text.split("\n")) == exhaustive(text.split("\n"))


BODY = "def total(xs):\n    return sum(xs)\n"
MANY = 3_000


@pytest.mark.parametrize(
    "text",
    [
        "Some words of prose, as a model writes them.\n" * MANY,
        "x = 1\n" * MANY,
        "x = 1\n" * MANY + "and prose\n" * MANY,
        BODY * MANY + "and prose",
        ("Here is it:\n" + BODY) * MANY,
        "x = (\n" * MANY,
        "x = )\n" * MANY,
        "@a\n" * MANY + "!!!",
        "@a.b(1)\n" * 500 + "!!!",
        "if x:\n" * MANY,
        "\n" * MANY + "  x",
        "# comment\n" * MANY + "  x",
        'x = """\n' * MANY,
        '"""\n' + "prose\n" * MANY,
        "[\n" + "1,\n" * MANY,
        "try:\n" + "    x = 1\n" * 700 + "!!!",
        "x = (" + "(" * 5_000 + "\n" + "prose\n" * 500,
        "x = " + "-" * 50_000 + "1\n" + "y = 1\n" * 500,
        "x = 1 \\\n" * MANY,
        "x = 1\n" * MANY + "\0\n" + "x = 1\n" * MANY,
        "total = 1\ndef total(x): pass\n" * 500 + "def total(x):\n" + "    x = 1\n" * MANY,
    ],
)
def test_long_texts_are_searched_quickly(text):
    started = time.process_time()
    extract(text, ["total"])
    assert time.process_time() - started < 12


def test_deep_programs_are_kept_as_they_are():
    text = "def total(xs):\n    return " + "+".join(["1"] * 500) + "\n"
    assert extract(text, ["total"])
