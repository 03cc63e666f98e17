"""Programs that try to pass tests without being right. None of them passes."""

import secrets
from textwrap import dedent

import pytest

from tests.sandbox.programs import LIMITS, SHORT_WALL_LIMIT
from trans_peft.sandbox.check import CodeTests, FailureReason, check_program
from trans_peft.validation.rules.program_tests import humaneval_tests

FORGE_FRAMES = """
import json, os, struct
def frame(message):
    data = json.dumps(message).encode()
    return struct.pack(">I", len(data)) + data
for fd in range(64):
    for message in (["value", None], {"reason": "passed", "detail": ""}, ["passed"]):
        try: os.write(fd, frame(message))
        except OSError: pass
"""
FORGERIES = {
    "exit with 0": "import os; os._exit(0)",
    "sys.exit with 0": "import sys; sys.exit(0)",
    "exit when called": "import os\ndef f(x): os._exit(0)",
    "SystemExit when called": "def f(x): raise SystemExit(0)",
    "print passed": "print('passed'); print('{\"reason\": \"passed\"}')\ndef f(x): print('passed')",
    "print passed at exit": "import atexit; atexit.register(print, 'passed')\ndef f(x): pass",
    "forge frames": FORGE_FRAMES,
    "forge frames when called": f"def f(x):\n    exec({FORGE_FRAMES!r})",
    "equal to everything": "class A:\n    __eq__ = lambda *_: True\nf = lambda x: A()",
    "not unequal to anything": "class A:\n    __ne__ = lambda s, o: False\nf = lambda x: A()",
    "an int equal to everything": "class A(int):\n    __eq__ = lambda *_: True\nf = lambda x: A(5)",
    "a str equal to everything": "class A(str):\n    __eq__ = lambda *_: True\nf = lambda x: A('')",
    "a list equal to everything": "class A(list):\n    __eq__ = lambda *_: True\nf = lambda x: A()",
    "a false class": "class A:\n    __class__ = int; __eq__ = lambda *_: True\nf = lambda x: A()",
    "no AssertionError": "import builtins\nbuiltins.AssertionError = Warning\ndef f(x): pass",
    "exit in a trace": "import sys\nsys.settrace(lambda *_: sys.exit(0))\ndef f(x): pass",
    "replace the checker": """
        import sys
        from types import ModuleType
        for name in list(sys.modules):
            if "sandbox" in name:
                module = sys.modules[name]
                for key in list(vars(module)):
                    if callable(getattr(module, key)) and key not in ("send", "receive"):
                        setattr(module, key, lambda *_, **__: ["value", True])
        def f(x): return True
        check = lambda candidate: None
    """,
    "replace send": """
        import sys
        from trans_peft.sandbox import candidate
        candidate.send = lambda stream, message: (stream.write(b"\\xff" * 4), stream.flush())
    """,
    "find the answer in memory": """
        import gc, sys
        def f(x):
            frame = sys._getframe()
            while frame:
                for value in frame.f_locals.values():
                    if isinstance(value, int) and value > 10**30: return value
                frame = frame.f_back
            for thing in gc.get_objects():
                if isinstance(thing, str) and "assert" in thing and "==" in thing:
                    return int(thing.split("==")[1])
                if isinstance(thing, (list, tuple, dict)):
                    for value in thing.values() if isinstance(thing, dict) else thing:
                        if type(value) is int and value > 10**30: return value
    """,
    "stop the tests": "import os, signal\ndef f(x):\n    os.kill(-1, signal.SIGKILL); return 0",
    "return an iterator": "def f(x): return iter([])",
    "return an endless iterator": "import itertools\ndef f(x): return itertools.count()",
    "return too much": "def f(x): return 'x' * (1 << 26)",
    "return a huge int": "def f(x): return 1 << (1 << 28)",
    "return a deep list": "def f(x):\n    v = []\n    for _ in range(10**5): v = [v]\n    return v",
    "return a list that contains itself": "def f(x):\n    v = []; v.append(v); return v",
    "recurse deep": "import sys; sys.setrecursionlimit(10**9)\ndef f(x): return max([x], key=f)",
    "crash the interpreter": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "source that is not text": "\ud800 = '\0'",
    "a long string of combining characters": "def f(x): return '\\u0301\\ud800' * (1 << 22)",
    "signals": """
        import signal
        for n in range(1, 65):
            try: signal.signal(n, signal.SIG_IGN)
            except Exception: pass
        def f(x):
            while True: signal.pause()
    """,
}  # fmt: skip


@pytest.mark.usefixtures("all_guards")
@pytest.mark.parametrize("program", FORGERIES.values(), ids=FORGERIES)
def test_a_forgery_does_not_pass(program):
    answer = secrets.randbits(120) | 1 << 119
    tests = CodeTests(f"assert f(1) == {answer}\nassert not f(2) != {answer}", ("f",))
    limits = SHORT_WALL_LIMIT if "signal.pause" in program else LIMITS
    result = check_program(dedent(program), tests, limits=limits)
    assert not result.passed
    assert result.reason is not FailureReason.PASSED


@pytest.mark.usefixtures("all_guards")
@pytest.mark.parametrize(
    "test",
    ["assert set([f(1)]) == set([3])", "assert abs(f(1) - 3) < 1e-9",
     "assert sorted([f(1)]) == [3]", "assert math.isclose(f(1), 3)"],
)  # fmt: skip
def test_a_program_cannot_redefine_what_the_tests_use(test):
    program = """
        import builtins, math
        def set(*_, **__): return 0
        abs = isclose = isinstance = sorted = set
        builtins.set = builtins.abs = builtins.sorted = set
        math.isclose = lambda *_: True
        def f(x): return 0
    """
    tests = CodeTests(test, ("f",), preamble="import math")
    result = check_program(dedent(program), tests, limits=LIMITS)
    assert result.reason is FailureReason.WRONG, result


@pytest.mark.usefixtures("all_guards")
@pytest.mark.parametrize(
    "test",
    ["assert f(1) != 3", "assert not f(1) == 3", "assert f(1)", "assert [*f(1)] or True",
     "try:\n    assert f(1) == 3\nexcept:\n    pass", "assert f(1) in [1, 2] or True",
     "assert {f(1): 0}"],
)  # fmt: skip
def test_an_object_of_the_program_is_never_compared(test):
    program = "class A:\n    pass\ndef f(x): return A()"
    result = check_program(program, CodeTests(test, ("f",)), limits=LIMITS)
    assert (result.passed, result.reason) == (False, FailureReason.UNREPRESENTABLE)


@pytest.mark.usefixtures("all_guards")
def test_a_program_cannot_redefine_helpers_of_the_prompt():
    prompt = "def double(x):\n    return 2 * x\n\ndef half(x):\n    '''Undo double.'''\n"
    tests = humaneval_tests(prompt, "def check(c):\n    assert double(c(4)) == 4\n", "half")
    forged = f"{prompt}    return 0\ndef double(x): return 4\n"
    assert not check_program(forged, tests, limits=LIMITS).passed
    assert check_program(f"{prompt}    return x / 2\n", tests, limits=LIMITS).passed
