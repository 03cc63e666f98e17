"""Calls in a child process: results, errors, limits, and the end of the process."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.isolation import functions
from trans_peft import errors
from trans_peft.errors import (
    ContentError,
    DataError,
    IsolationError,
    LimitExceededError,
    TransPeftError,
)
from trans_peft.isolation import CallLimits, call_isolated, is_memory_limit_error, prepare

SUBJECT = "the tokenizer of s3://bases/mine"
TORCH = ("torch",)

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def call(function, *args, **options):
    return call_isolated(function, *args, subject=SUBJECT, **options)


@settings(max_examples=40, deadline=None)
@given(plain)
def test_plain_values_are_returned_unchanged(value):
    assert call(functions.echo, value) == [value]


def test_lone_surrogates_are_returned_and_paths_are_refused(tmp_path):
    assert call(functions.echo, "\ud800 \N{SNOWMAN}") == ["\ud800 \N{SNOWMAN}"]
    with pytest.raises(ContentError, match="plain JSON values, not PosixPath"):
        call(functions.echo, tmp_path)


def test_modules_are_imported_once_and_in_the_background(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text(
        "import pathlib, time\n"
        "time.sleep(1)\n"
        "with pathlib.Path(__file__).with_name('imported').open('a') as file:\n"
        "    file.write('once ')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    started_s = time.monotonic()
    prepare(["slow_to_import"])
    assert time.monotonic() - started_s < 0.5
    assert not (tmp_path / "imported").exists()
    assert call(functions.echo, 1, imports=["slow_to_import"]) == [1]
    assert (tmp_path / "imported").read_text() == "once "


def test_a_module_that_cannot_be_prepared_affects_no_call():
    prepare(["no_such_module"])
    assert call(functions.echo, 1) == [1]


@pytest.mark.parametrize("kind", ["object", "set", "int keys", "bytes", "deep"])
def test_a_result_that_json_cannot_represent_is_an_error(kind):
    with pytest.raises(ContentError):
        call(functions.returns, kind)


def test_a_function_that_cannot_be_imported_is_refused():
    with pytest.raises(TypeError, match="cannot be imported"):
        call(lambda: 1)


KINDS = sorted(
    name
    for name in errors.__all__
    if isinstance(kind := getattr(errors, name), type) and issubclass(kind, TransPeftError)
)


@pytest.mark.parametrize("name", KINDS)
def test_errors_of_the_library_keep_their_type_and_text(name):
    with pytest.raises(TransPeftError) as caught:
        call(functions.raises, name, "row 3\n  found: x")
    assert type(caught.value) is getattr(errors, name)
    assert str(caught.value) == "row 3\n  found: x"


@pytest.mark.parametrize("name", ["ValueError", "KeyError", "OSError", "RecursionError"])
def test_other_errors_name_the_content_and_their_type(name):
    with pytest.raises(ContentError, match=f"(?s){SUBJECT} cannot be evaluated.*{name}.*odd"):
        call(functions.raises, name, "odd")


def test_endless_recursion_is_an_error():
    with pytest.raises(ContentError, match="RecursionError"):
        call(functions.recurses, 0)


@pytest.mark.parametrize("function", [functions.matches_forever, functions.loops_in_threads])
def test_processor_time_is_limited(function):
    with pytest.raises(LimitExceededError, match=f"(?s){SUBJECT}.*processor time.*at most 1 s"):
        call(function, limits=CallLimits(cpu_s=1))


@pytest.mark.parametrize("function", [functions.sleeps, functions.ignores_signals])
def test_elapsed_time_is_limited(function):
    started = time.monotonic()
    with pytest.raises(LimitExceededError, match=f"(?s){SUBJECT}.*time.*at most 1 s"):
        call(function, limits=CallLimits(wall_s=1, cpu_s=3600))
    assert time.monotonic() - started < 20


MEMORY = CallLimits(memory_bytes=256 << 20, cpu_s=60)


@pytest.mark.parametrize(
    ("function", "size", "imports"),
    [
        (functions.allocates, 4 << 30, ()),
        (functions.allocates_in_small_steps, 4 << 30, ()),
        (functions.allocates_with_torch, 4 << 30, TORCH),
        (functions.encodes_huge, 2, ("tokenizers",)),
    ],
)
def test_memory_is_limited(function, size, imports):
    with pytest.raises(LimitExceededError, match=f"(?s){SUBJECT}.*memory.*at most 256 MiB"):
        call(function, size, limits=MEMORY, imports=imports)


def test_torch_works_below_the_memory_limit():
    assert call(functions.adds_with_torch, 10 << 20, limits=MEMORY, imports=TORCH) == 10 << 20


def test_the_size_of_a_result_is_limited():
    with pytest.raises(LimitExceededError, match="space for its result"):
        call(functions.returns, "large", limits=CallLimits(result_bytes=1000))


def test_the_size_of_a_file_is_limited(tmp_path):
    with pytest.raises(ContentError, match="File too large"):
        call(
            functions.writes, str(tmp_path / "file"), 2 << 20, limits=CallLimits(file_bytes=1 << 20)
        )


@pytest.mark.parametrize("invalid", [{"cpu_s": 0}, {"memory_bytes": -1}, {"wall_s": float("nan")}])
def test_a_limit_that_is_not_positive_is_refused(invalid):
    with pytest.raises(ValueError, match="must be positive"):
        CallLimits(**invalid)


def test_a_crash_is_an_error_about_the_content():
    with pytest.raises(ContentError, match=r"(?s)crashed.*SIGSEGV"):
        call(functions.reads_null)
    with pytest.raises(ContentError, match=r"(?s)crashed.*exit code 7"):
        call(functions.exits, 7)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_from_outside_is_not_blamed_on_the_content(number):
    with pytest.raises(IsolationError, match="killed from outside"):
        call(functions.dies, number)


@pytest.mark.parametrize(
    "reply",
    [
        "garbage",
        "\x00" * 7 + "\x05" + "hello",
        "\xff" * 8,
        "\x00" * 7 + "\x02" + "[]",
        "\x00" * 7 + "\x04" + "null",
        "\x00" * 7 + "\x0f" + '{"limit": "odd"}'[:15],
        "\x00" * 7 + "\x0f" + '{"limit": "no"}',
        "\x00" * 7 + "\x09" + '{"text":1}'[:9],
    ],
)
def test_an_invalid_reply_is_an_error(reply):
    with pytest.raises((ContentError, IsolationError)):
        call(functions.sends_invalid_reply, reply)
    assert call(functions.echo, 1) == [1]


def test_calls_share_no_state_and_run_in_parallel():
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: [*call(functions.pids), n], range(16)))
    assert len({pid for pid, _, _ in found}) == 16
    assert len({parent for _, parent, _ in found}) == 1


def test_a_server_that_was_killed_is_started_again():
    _, server = call(functions.pids)
    os.kill(server, signal.SIGKILL)
    assert call(functions.pids)[1] != server


def test_a_server_killed_during_a_call_is_reported(tmp_path):
    def kill():
        path = tmp_path / "pids"
        while not path.exists() or not path.read_text().endswith("\n"):
            time.sleep(0.02)
        os.kill(int(path.read_text().split()[1]), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(IsolationError):
        call(functions.reports_and_sleeps, str(tmp_path / "pids"))
    thread.join()
    child, server = map(int, (tmp_path / "pids").read_text().split())
    _wait_until(lambda: not _alive(child) and not _alive(server))


def test_the_child_has_no_credentials_and_the_callers_working_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.chdir(tmp_path)
    os.kill(call(functions.pids)[1], signal.SIGKILL)
    assert not [n for n in call(functions.environment) if n.startswith(("AWS_", "MLFLOW_"))]
    assert call(functions.folder) == str(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_ends_with_its_parent(tmp_path, number):
    code = f"""
        from tests.isolation import functions
        from trans_peft.isolation import call_isolated
        call_isolated(functions.reports_and_sleeps, {str(tmp_path / "pids")!r}, subject="x")
    """
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=root,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    ) as parent:
        pids = tmp_path / "pids"
        _wait_until(lambda: pids.exists() and pids.read_text().endswith("\n"))
        parent.send_signal(number)
    child, server = map(int, pids.read_text().split())
    _wait_until(lambda: not _alive(child) and not _alive(server))


def test_a_fork_of_the_caller_starts_its_own_server():
    _, server = call(functions.pids)
    pid = os.fork()
    if not pid:
        try:
            os._exit(0 if call(functions.pids)[1] != server else 1)
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    assert call(functions.pids)[1] == server


def test_an_abandoned_call_ends(tmp_path):
    code = f"""
        import signal
        from tests.isolation import functions
        from trans_peft.isolation import call_isolated
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.alarm(4)
        try:
            call_isolated(functions.reports_and_sleeps, {str(tmp_path / "pids")!r}, subject="x")
        except KeyboardInterrupt:
            call_isolated(functions.sleeps, subject="x")
    """
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    ) as parent:
        pids = tmp_path / "pids"
        _wait_until(lambda: pids.exists() and pids.read_text().endswith("\n"))
        child, server = map(int, pids.read_text().split())
        _wait_until(lambda: not _alive(child))
        assert _alive(server)
        parent.kill()


def test_a_data_error_is_still_a_value_error():
    with pytest.raises(ValueError, match="odd"):
        call(functions.raises, DataError.__name__, "odd")


def _alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_until(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not true within {seconds} s"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("memory"), False),
    ],
)
def test_every_error_of_a_reached_memory_limit_is_recognized(error, expected):
    assert is_memory_limit_error(error) is expected
