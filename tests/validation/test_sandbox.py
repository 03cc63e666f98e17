"""Hostile programs, each with what it tries: none is scored as passed, and nothing gets out.

Where the machine has not all guards (a container without user namespaces), the refusal is asserted
instead. Unprivileged users and root take different paths through the sandbox: run it as both.
"""

import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trans_peft.errors import DataError, EvaluationError, InvalidSpecError
from trans_peft.validation.sandbox import protocol, values
from trans_peft.validation.sandbox.check import (
    CodeTests,
    FailureReason,
    check_code,
    humaneval_tests,
    mbpp_tests,
)
from trans_peft.validation.sandbox.forkserver import ForkServer
from trans_peft.validation.sandbox.limits import Limits
from trans_peft.validation.sandbox.process import Sandbox
from trans_peft.validation.sandbox.run import RunResult, missing_guards, run_code

MEBIBYTE = 1 << 20
LIMITS = Limits(wall_s=4, cpu_s=1, memory_bytes=128 * MEBIBYTE, scratch_bytes=2 * MEBIBYTE)
SOON = replace(LIMITS, wall_s=0.5)


@pytest.fixture
def guarded() -> None:
    """Assert the refusal, and leave, on a machine that lacks a guard."""
    if missing_guards():
        with pytest.raises(EvaluationError, match="lacks guards"):
            run_code("print('must not run')")
        pytest.skip(f"lacks {', '.join(missing_guards())}: refused, as it must be")


def run(program: str, limits: Limits = LIMITS) -> RunResult:
    return run_code(dedent(program), limits=limits)


def attempts(*lines: str, imports: str = "os") -> str:
    """A program that tries each line, and prints those that worked."""
    tries = [
        f"try:\n    {line}\n    print({line!r})\nexcept BaseException:\n    pass" for line in lines
    ]
    return "\n".join((f"import {imports}", *tries, "print('tried')"))


# ---- what travels between program and tests ----

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.binary() | st.complex_numbers(allow_nan=False) | st.decimals(allow_nan=False)
    | st.fractions() | st.just(range(1, 9, 2))
)  # fmt: skip
hashables = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6
)
plain = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.lists(inner, max_size=3).map(deque)
        | st.sets(hashables, max_size=3)
        | st.frozensets(hashables, max_size=3)
        | st.dictionaries(hashables, inner, max_size=3)
        | st.dictionaries(hashables, inner, max_size=3).map(OrderedDict)
        | st.dictionaries(hashables, st.integers(), max_size=3).map(Counter)
    ),
    max_leaves=10,
)  # fmt: skip
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["object", "type", *values._KINDS]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=10,
)  # fmt: skip


def nothing_else(value: object) -> object:
    raise values.Unrepresentable(repr(value))


def there_and_back(value: object) -> object:
    return values.decode(json.loads(json.dumps(values.encode(value, nothing_else))), nothing_else)


@settings(max_examples=50, deadline=None)
@given(plain)
def test_plain_values_come_back_equal_and_of_their_type(value):
    back = there_and_back(value)
    assert back == value
    assert repr(back) == repr(value) or isinstance(
        value, set | frozenset | dict | list | tuple | deque
    )
    assert type(back) is type(value)


@pytest.mark.parametrize(
    ("value", "back"),
    [
        (10**5000, 10**5000),
        (float("inf"), float("inf")),
        ("\ud800\0", "\ud800\0"),
        (Decimal("1.10"), Decimal("1.10")),
        (Fraction(1, 3), Fraction(1, 3)),
        (type("Pair", (tuple,), {})((1, 2)), (1, 2)),
        (type("Liar", (str,), {"__eq__": lambda *_: True, "__str__": lambda _: "x"})("a"), "a"),
        (signal.SIGKILL, 9),
        (int, int),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_subclass_travels_as_its_base(value, back):
    assert there_and_back(value) == back
    assert type(there_and_back(value)) is type(back)


def test_iterators_are_read_and_stay_iterators():
    assert list(there_and_back(x * x for x in range(3))) == [0, 1, 4]
    assert there_and_back(iter([1])) != [1]


@settings(max_examples=50, deadline=None)
@given(json_values)
def test_whatever_arrives_is_a_plain_value_or_an_expected_error(data):
    expected = (ArithmeticError, LookupError, TypeError, ValueError, values.Unrepresentable)
    with suppress(*expected):
        values.decode(data, nothing_else)


def test_a_value_that_contains_itself_cannot_travel():
    value: list[object] = []
    value.append(value)
    with pytest.raises(values.Unrepresentable, match="contains itself"):
        there_and_back(value)


# ---- honest programs get the verdict that one interpreter would give them ----

PROMPT = 'def area(a, b):\n    """Return a times b."""\n'
TESTS = humaneval_tests(
    PROMPT,
    "def check(candidate):\n"
    "    assert candidate(2, 3) == 6\n"
    "    assert candidate(2, b=[1]) == [1, 1]\n"
    "    assert abs(candidate(0.1, 3) - 0.3) < 1e-6\n",
    "area",
)


@pytest.mark.usefixtures("guarded")
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
def test_honest_programs_get_the_verdict_of_one_interpreter(body, reason):
    program = f"{PROMPT}    {body}\n"
    limits = SOON if reason is FailureReason.TIMED_OUT else LIMITS
    result = check_code(program, TESTS, limits=limits)
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


@pytest.mark.usefixtures("guarded")
def test_a_failure_names_the_line_of_the_tests():
    result = check_code(f"{PROMPT}    return 6\n", TESTS, limits=LIMITS)
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


@pytest.mark.usefixtures("guarded")
def test_objects_of_the_programs_own_are_used_from_afar():
    assert MBPP_TREE.names == ("Node", "depth", "labels")
    assert check_code(TREE, MBPP_TREE, limits=LIMITS).passed


def test_what_an_mbpp_row_asks_of_a_program_is_read_from_its_reference():
    tests = mbpp_tests(
        ["assert sum(10, 15) == 6", "assert set([sum(1, 1)]) == {1}", "assert math.isclose(1, 1)"],
        reference="import math\ndef sum(a, b):\n    set, unused = a, b\n    return 6",
    )
    assert (tests.names, tests.preamble) == (("sum",), "import math")


@pytest.mark.parametrize(
    "make",
    [
        lambda: CodeTests("assert (", ("f",)),
        lambda: CodeTests("assert True", ()),
        lambda: mbpp_tests(["assert g(1)"], reference="def f(): pass"),
        lambda: mbpp_tests(["assert f("], reference="def f(): pass"),
    ],
)
def test_broken_tests_are_the_data_sets_fault(make):
    with pytest.raises(DataError):
        make()


def test_limits_that_cannot_be_are_told_at_once():
    with pytest.raises(InvalidSpecError, match=r"wall_s.*memory_bytes"):
        Limits(wall_s=0, memory_bytes=1)


# ---- programs that want to be scored as right ----

FORGE_FRAMES = """
import json, os, struct
def frame(words):
    data = json.dumps(words).encode()
    return struct.pack(">I", len(data)) + data
for fd in range(64):
    for words in (["value", None], {"reason": "passed", "detail": ""}, ["passed"]):
        try: os.write(fd, frame(words))
        except OSError: pass
"""
FORGERIES = {
    "exit with 0": "import os; os._exit(0)",
    "sys.exit with 0": "import sys; sys.exit(0)",
    "exit when asked": "import os\ndef f(x): os._exit(0)",
    "SystemExit when asked": "def f(x): raise SystemExit(0)",
    "say passed": "print('passed'); print('{\"reason\": \"passed\"}')\ndef f(x): print('passed')",
    "say passed at exit": "import atexit; atexit.register(print, 'passed')\ndef f(x): pass",
    "forge frames": FORGE_FRAMES,
    "forge frames when asked": f"def f(x):\n    exec({FORGE_FRAMES!r})",
    "equal to everything": "class A:\n    __eq__ = lambda *_: True\nf = lambda x: A()",
    "not unequal to anything": "class A:\n    __ne__ = lambda s, o: False\nf = lambda x: A()",
    "an int equal to everything": "class A(int):\n    __eq__ = lambda *_: True\nf = lambda x: A(5)",
    "a str equal to everything": "class A(str):\n    __eq__ = lambda *_: True\nf = lambda x: A('')",
    "a list equal to everything": "class A(list):\n    __eq__ = lambda *_: True\nf = lambda x: A()",
    "a false class": "class A:\n    __class__ = int; __eq__ = lambda *_: True\nf = lambda x: A()",
    "no AssertionError": "import builtins\nbuiltins.AssertionError = Warning\ndef f(x): pass",
    "leave the tests": "import sys\nsys.settrace(lambda *_: sys.exit(0))\ndef f(x): pass",
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
        from trans_peft.validation.sandbox import candidate
        candidate.send = lambda stream, words: (stream.write(b"\\xff" * 4), stream.flush())
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
    "answer with an iterator": "def f(x): return iter([])",
    "answer without end": "import itertools\ndef f(x): return itertools.count()",
    "answer with too much": "def f(x): return 'x' * (1 << 26)",
    "answer with a huge int": "def f(x): return 1 << (1 << 28)",
    "answer nested deep": "def f(x):\n    v = []\n    for _ in range(10**5): v = [v]\n    return v",
    "answer with itself": "def f(x):\n    v = []; v.append(v); return v",
    "recurse deep": "import sys; sys.setrecursionlimit(10**9)\ndef f(x): return max([x], key=f)",
    "crash the interpreter": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "source that is no text": "\ud800 = '\0'",
    "a bomb of unicode": "def f(x): return '\\u0301\\ud800' * (1 << 22)",
    "signals": """
        import signal
        for n in range(1, 65):
            try: signal.signal(n, signal.SIG_IGN)
            except Exception: pass
        def f(x):
            while True: signal.pause()
    """,
}  # fmt: skip


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("program", FORGERIES.values(), ids=FORGERIES)
def test_a_forgery_is_not_scored_as_passed(program):
    answer = secrets.randbits(120) | 1 << 119
    tests = CodeTests(f"assert f(1) == {answer}\nassert not f(2) != {answer}", ("f",))
    limits = SOON if "signal.pause" in program else LIMITS
    result = check_code(dedent(program), tests, limits=limits)
    assert not result.passed
    assert result.reason is not FailureReason.PASSED


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(
    "test",
    ["assert set([f(1)]) == set([3])", "assert abs(f(1) - 3) < 1e-9",
     "assert sorted([f(1)]) == [3]", "assert math.isclose(f(1), 3)"],
)  # fmt: skip
def test_what_the_tests_use_is_not_the_programs_to_redefine(test):
    program = """
        import builtins, math
        def set(*_, **__): return 0
        abs = isclose = isinstance = sorted = set
        builtins.set = builtins.abs = builtins.sorted = set
        math.isclose = lambda *_: True
        def f(x): return 0
    """
    tests = CodeTests(test, ("f",), preamble="import math")
    result = check_code(dedent(program), tests, limits=LIMITS)
    assert result.reason is FailureReason.WRONG, result


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(
    "test",
    ["assert f(1) != 3", "assert not f(1) == 3", "assert f(1)", "assert [*f(1)] or True",
     "try:\n    assert f(1) == 3\nexcept:\n    pass", "assert f(1) in [1, 2] or True",
     "assert {f(1): 0}"],
)  # fmt: skip
def test_tests_never_ask_an_object_of_the_programs_own(test):
    program = "class A:\n    pass\ndef f(x): return A()"
    result = check_code(program, CodeTests(test, ("f",)), limits=LIMITS)
    assert (result.passed, result.reason) == (False, FailureReason.UNREPRESENTABLE)


@pytest.mark.usefixtures("guarded")
def test_helpers_of_the_prompt_are_not_the_programs_to_define():
    prompt = "def double(x):\n    return 2 * x\n\ndef half(x):\n    '''Undo double.'''\n"
    tests = humaneval_tests(prompt, "def check(c):\n    assert double(c(4)) == 4\n", "half")
    forged = f"{prompt}    return 0\ndef double(x): return 4\n"
    assert not check_code(forged, tests, limits=LIMITS).passed
    assert check_code(f"{prompt}    return x / 2\n", tests, limits=LIMITS).passed


# ---- programs that want out ----


@pytest.mark.usefixtures("guarded")
def test_nothing_of_the_callers_environment_is_seen(monkeypatch, tmp_path):
    secret = secrets.token_hex(16)
    monkeypatch.setenv("TRANS_PEFT_SECRET", secret)
    monkeypatch.setattr(
        process, "_NURSERY", ForkServer()
    )  # started with the secret in the environment
    (tmp_path / "token").write_text(secret)
    outcome = run(f"""
        import glob, os, subprocess
        print("tried", dict(os.environ), os.environb)
        import ctypes; print(ctypes.CDLL(None).getenv(b"TRANS_PEFT_SECRET"))
        places = ["/proc/self/environ", "/proc/1/environ", "/proc/{os.getpid()}/environ",
                  {str(tmp_path / "token")!r}, {__file__!r}, "/etc/passwd", "/etc/hostname"]
        for pattern in ("/proc/*/environ", "/root/.*", "/home/*/*"): places += glob.glob(pattern)
        for place in places:
            try: print("read", place, open(place).read())
            except OSError: pass
    """)
    assert "tried" in outcome.stdout, outcome
    assert secret not in outcome.stdout + outcome.stderr
    assert "read" not in outcome.stdout
    assert str(Path.home()) not in outcome.stdout


@pytest.mark.usefixtures("guarded")
def test_nothing_is_written_outside_the_scratch_folder(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    outcome = run(
        attempts(
            f"open({str(victim)!r}, 'a').write('x')",
            f"open({str(tmp_path / 'new')!r}, 'w')",
            "open('/new', 'w')",
            "open('/scratch/../new', 'w')",
            "open('/dev/new', 'w')",
            "open(os.__file__, 'a')",
            "os.remove(os.__file__)",
            "os.chmod('/', 0o777)",
            "os.mkdir('/usr/new')",
            "os.mknod('/scratch/disk', 0o60666, os.makedev(254, 0))",
            f"os.symlink({str(victim)!r}, 'link'); open('link', 'a').write('x')",
            "os.link(os.__file__, 'hard')",
            "os.symlink('/', 'root'); open('root/new', 'w')",
            "os.chroot('.'); os.chdir('../../..')",
            "os.rename('/usr', '/scratch/usr')",
        )
    )
    assert outcome.stdout == "tried\n", outcome
    assert victim.read_text() == "untouched"
    assert list(tmp_path.iterdir()) == [victim]
    assert run("open('x', 'w').write('y'); print(open('/scratch/x').read())").stdout == "y\n"


@pytest.mark.usefixtures("guarded")
def test_no_connection_leaves(tmp_path):
    listeners = {}
    for family, address in (
        (socket.AF_INET, ("127.0.0.1", 0)),
        (socket.AF_UNIX, str(tmp_path / "s")),
        (socket.AF_UNIX, f"\0{tmp_path}"),
    ):
        listener = socket.socket(family)
        listener.bind(address)
        listener.listen()
        listener.setblocking(False)
        listeners[listener] = listener.getsockname()
    calls = [
        f"socket.socket(socket.{listener.family.name}).connect({address!r})"
        for listener, address in listeners.items()
    ]
    outcome = run(
        attempts(
            *calls,
            "socket.socket(socket.AF_VSOCK)",
            "socket.socket(socket.AF_NETLINK)",
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 53))",
            "socket.getaddrinfo('localhost', 80)",
            imports="socket",
        )
    )
    assert outcome.stdout == "tried\n", outcome
    for listener in listeners:
        with pytest.raises(BlockingIOError):
            listener.accept()
        listener.close()


@pytest.mark.usefixtures("guarded")
def test_the_network_is_away_even_without_the_filter(monkeypatch):
    """Two guards stand before the network; the namespace alone holds too."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    listener.setblocking(False)
    program = f"import socket; s = socket.socket(); print('a socket'); s.connect({address!r})"
    script = f"""
        from trans_peft.validation.sandbox import inside, box
        inside.forbid_system_calls = lambda: None
        import os, socket
        nursery, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            nursery.close()
            inside.main(theirs.detach())
            os._exit(0)
        theirs.close()
        class Forked:
            def fork(self, line, fds):
                socket.send_fds(nursery, [b"."], (line.fileno(), *fds))
        process._NURSERY = Forked()
        from trans_peft.validation.sandbox.run import run_code
        print(run_code({program!r}))
    """
    done = subprocess.run([sys.executable, "-c", dedent(script)], capture_output=True, text=True)
    assert "a socket" in done.stdout, done
    assert "unreachable" in done.stdout
    with pytest.raises(BlockingIOError):
        listener.accept()
    listener.close()


@pytest.fixture
def bystander() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


@pytest.mark.usefixtures("guarded")
def test_no_process_outside_is_reached(bystander):
    # The lowest numbers are the sandbox's own processes in there.
    pids = [pid for pid in (bystander.pid, os.getpid(), os.getppid()) if pid > 9]
    outcome = run(
        attempts(
            "os.kill(os.getppid(), 9) if os.getppid() else 1 / 0",
            *(f"os.kill({pid}, 9)" for pid in pids),
            *(f"os.killpg({pid}, 9)" for pid in pids),
            *(f"os.pidfd_open({pid})" for pid in pids),
            *(f"open('/proc/{pid}/mem', 'r+b')" for pid in pids),
            *(f"assert libc.ptrace(16, {pid}, 0, 0) == 0" for pid in pids),
            "assert libc.ptrace(0, 0, 0, 0) == 0",
            f"assert libc.process_vm_readv({bystander.pid}, 0, 0, 0, 0, 0) == 0",
            f"os.sched_setaffinity({bystander.pid}, [0])",
            imports="os, ctypes; libc = ctypes.CDLL(None)",
        )
    )
    assert outcome.stdout == "tried\n", outcome
    assert "ProcessLookupError" in run("import os; os.kill(-1, 9)").stderr  # it is alone
    assert bystander.poll() is None


@pytest.mark.usefixtures("guarded")
def test_no_privilege_is_regained():
    outcome = run(
        attempts(
            "os.setuid(0)",
            "os.setresuid(0, 0, 0)",
            "os.setgroups([0])",
            "os.nice(-5)",
            "resource.setrlimit(resource.RLIMIT_NPROC, (1000, 1000))",
            "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
            "os.sethostname('x') if hasattr(os, 'sethostname') else socket.sethostname('x')",
            "assert libc.unshare(0x10000000) == 0",
            "assert libc.unshare(0x40000000) == 0",
            "assert libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0) >= 0",
            "assert libc.mount(b'none', b'/scratch', b'tmpfs', 0, 0) == 0",
            "assert libc.umount2(b'/scratch', 2) == 0",
            "assert libc.prctl(1, 0, 0, 0, 0) == 0",
            "assert libc.prctl(38, 0, 0, 0, 0) == 0",
            "assert libc.keyctl(0, -3, 0) >= 0",
            imports="os, socket, resource, ctypes; libc = ctypes.CDLL(None)",
        )
    )
    assert outcome.stdout == "tried\n", outcome


@pytest.mark.usefixtures("guarded")
def test_open_descriptors_of_the_caller_are_closed(tmp_path):
    with (tmp_path / "open").open("wb") as file:
        os.set_inheritable(file.fileno(), True)
        outcome = run("""
            import os
            for fd in range(3, 4096):
                try: os.write(fd, b"x")
                except OSError: continue
                print("wrote to", fd)
        """)
    assert outcome.stdout == "", outcome
    assert (tmp_path / "open").read_bytes() == b""


# ---- programs that want too much ----


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(
    ("program", "limits", "stopped"),
    [
        ("while True: print('x' * 999)", Limits(output_bytes=5000), "output"),
        (
            "import sys\nwhile True: sys.stderr.write('x' * 999)",
            Limits(output_bytes=5000),
            "output",
        ),
        ("while True: pass", replace(LIMITS, wall_s=30), "cpu"),
        ("import time; time.sleep(60)", SOON, "wall"),
        (
            "import signal\nsignal.signal(15, 1)\nwhile True: signal.pause()",
            SOON,
            "wall",
        ),
        (
            "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nsignal.pause()",
            SOON,
            "wall",
        ),
    ],
)
def test_a_program_without_end_is_ended(program, limits, stopped):
    started = time.monotonic()
    outcome = run(program, limits)
    assert outcome.ending.stopped == stopped, outcome
    assert max(len(outcome.stdout), len(outcome.stderr)) <= limits.output_bytes
    assert time.monotonic() - started < limits.wall_s + 2


@pytest.mark.usefixtures("guarded")
def test_memory_is_bounded_by_every_way_to_it():
    outcome = run(
        attempts(
            "bytearray(1 << 30)",
            "[bytearray(1 << 20) for _ in range(150)]",
            "mmap.mmap(-1, 1 << 30)",
            "os.memfd_create('x')",
            "assert libc.shmget(0, 4096, 0o600) >= 0",
            "'x' * (1 << 40)",
            imports="os, mmap, ctypes; libc = ctypes.CDLL(None)",
        )
    )
    assert outcome.stdout == "tried\n", outcome


@pytest.mark.usefixtures("guarded")
def test_the_scratch_folder_is_bounded():
    outcome = run("""
        import os
        written = files = 0
        try:
            while True:
                with open(str(files), "wb", buffering=0) as file:
                    files += 1
                    while True:
                        written += file.write(b"x" * 4096)
                        if file.tell() >= 1 << 20: break
        except OSError as error: print(type(error).__name__)
        for name in os.listdir(): os.remove(name)
        try:
            for n in range(10**6): os.mkdir(str(n))
        except OSError: print(written, n)
    """)
    kind, figures = outcome.stdout.splitlines()
    written, folders = map(int, figures.split())
    assert (kind, written <= LIMITS.scratch_bytes, folders < 2000) == ("OSError", True, True)
    assert "x" not in run("import os; print(*os.listdir())").stdout


def write_while_running(program: str, limits: Limits) -> bytes:
    """Run a program on a pipe and return what was written there until nobody held it any more.

    A process that had outlived the program would hold the pipe still, and reading would not end.
    """
    read_fd, write_fd = os.pipe()
    with os.fdopen(read_fd, "rb", buffering=0) as reader, Path(os.devnull).open("wb") as null:
        with os.fdopen(write_fd, "wb") as writer:
            sandbox = Sandbox(limits, frozenset(), [writer.fileno(), null.fileno()])
            with sandbox:
                writer.close()
                sandbox.begin("script", {"program": dedent(program)})
                sandbox.ending()
        written = b""
        while select.select([reader], [], [], 2)[0]:
            chunk = reader.read(1 << 16)
            if not chunk:
                return written
            written += chunk
    raise AssertionError("a process has outlived its sandbox")


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(
    ("program", "at_most"),
    [
        ("""
        import os
        while True:
            try:
                if os.fork() == 0: os.write(1, b"%d " % os.getpid())
            except OSError: pass
        """, 3),
        ("""
        import threading, os, time
        threads = 0
        try:
            while True:
                threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
                threads += 1
                os.write(1, b"%d " % threads)
        except RuntimeError: pass
        """, 3),
        ("""
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                while True:
                    os.write(1, b"daemon ")
                    time.sleep(.1)
            os._exit(0)
        time.sleep(.2)
        """, 1),
    ],
    ids=["fork bomb", "thread bomb", "daemon"],
)  # fmt: skip
def test_all_processes_are_few_and_end_with_the_program(program, at_most):
    started = time.monotonic()
    written = write_while_running(program, Limits(wall_s=1, processes=4))
    assert time.monotonic() - started < 5
    assert len(set(written.split())) <= at_most


@pytest.mark.usefixtures("guarded")
def test_what_an_honest_program_needs_is_there():
    outcome = run("""
        import asyncio, concurrent.futures, hashlib, json, sqlite3, ssl, tempfile, uuid
        print("", file=open("/dev/null", "w"))
        with tempfile.TemporaryFile() as file: file.write(b"x")
        with concurrent.futures.ThreadPoolExecutor(2) as pool: list(pool.map(print, "ab"))
        asyncio.run(asyncio.sleep(0))
    """)
    assert (outcome.stdout, outcome.stderr) == ("a\nb\n", "")


@pytest.mark.usefixtures("guarded")
def test_stdin_is_empty():
    assert run("import sys; print(repr(sys.stdin.read()))").stdout == "''\n"


@pytest.mark.usefixtures("guarded")
def test_output_that_is_no_text_is_kept_as_far_as_it_goes():
    outcome = run("import os; os.write(1, b'\\xff\\xfea' + '\u0301'.encode() * 1000)")
    assert outcome.stdout.startswith("\ufffd\ufffda")
    assert outcome.ending.returncode == 0


@pytest.mark.usefixtures("guarded")
def test_every_run_is_as_fresh_and_ordered_as_the_first():
    program = "import sys; print({'a', 'b', 'c'}, hasattr(sys, 'seen')); sys.seen = open('x', 'x')"
    assert len({run(program).stdout for _ in range(3)}) == 1


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("victim", ["caller", "sandbox"])
def test_the_program_dies_with_whoever_started_it(victim):
    read_fd, write_fd = os.pipe()
    script = f"""
        import os, signal, threading
        from trans_peft.validation.sandbox.process import Sandbox
        from trans_peft.validation.sandbox.limits import Limits
        with Sandbox(Limits(), frozenset(), [{write_fd}, 2]) as sandbox:
            os.close({write_fd})
            program = "import time, ctypes; ctypes.CDLL(None).prctl(1, 0); print('on', flush=True)"
            sandbox.begin("script", {{"program": program + "; time.sleep(60)"}})
            print(os.getpid() if {victim!r} == "caller" else sandbox._pid, flush=True)
            sandbox.ending()
    """
    with (
        os.fdopen(read_fd, "rb") as reader,
        subprocess.Popen([sys.executable, "-c", dedent(script)], pass_fds=[write_fd],
                         stdout=subprocess.PIPE) as process,
    ):  # fmt: skip
        os.close(write_fd)
        assert process.stdout
        pid = int(process.stdout.readline())
        assert reader.readline() == b"on\n"
        started = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        assert reader.read() == b""
        assert time.monotonic() - started < 2


# ---- machines without the guards ----

BARE_MACHINE = """
    import os
    from trans_peft.errors import EvaluationError
    from trans_peft.validation.sandbox import kernel
    from trans_peft.validation.sandbox.check import CodeTests, check_code
    from trans_peft.validation.sandbox.guards import Guard
    from trans_peft.validation.sandbox.run import missing_guards, run_code
    from trans_peft.validation.sandbox.system_calls import forbid_system_calls
    kernel.gain_no_privileges()
    forbid_system_calls()  # unshare is refused, as in a container
    tests = CodeTests("assert f(2) == 4", ("f",))
    for attempt in (
        lambda: run_code("print('ran')"),
        lambda: run_code("print('ran')", allow_missing={Guard.USER}),
        lambda: check_code("def f(x): return 4", tests, allow_missing={*Guard} - {Guard.FILES}),
    ):
        try: print(attempt())
        except EvaluationError as error: print("refused", error)
    print(sorted(guard.value for guard in missing_guards()))
    told = frozenset(missing_guards())
    print(run_code("print('ran', open('x', 'w').name)", allow_missing=told))
    print(check_code("def f(x): return 4", tests, allow_missing=told))
    print(check_code("import os; os._exit(0)", tests, allow_missing=told))
"""


def test_without_guards_nothing_runs_unless_told_explicitly():
    done = subprocess.run(
        [sys.executable, "-c", dedent(BARE_MACHINE)], capture_output=True, text=True
    )
    refused, told = done.stdout.split("['files', ", 1)
    assert refused.count("refused this machine lacks guards") == 3, done
    assert "ran" not in refused.replace("were run", "").replace("was run", "")
    assert "user: runs as nobody" in refused and "Operation not permitted" in refused
    assert "allow_missing=frozenset({Guard.FILES" in refused
    assert "stdout='ran x\\n'" in told
    assert told.count("passed=True") == 1 and told.count("passed=False") == 1


def test_a_message_too_long_is_not_sent():
    class Sink:
        def write(self, data: bytes) -> None:
            raise AssertionError("something was written")

        flush = write

    with pytest.raises(protocol.BadMessage):
        protocol.send(Sink(), "x" * protocol.MAX_MESSAGE_BYTES)
