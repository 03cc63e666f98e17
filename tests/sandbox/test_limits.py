"""Programs that use too much time, memory, output or processes, and what ordinary ones may use."""

import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest

from tests.sandbox.programs import LIMITS, SHORT_WALL_LIMIT, attempts, run
from trans_peft.sandbox.limits import SandboxLimits
from trans_peft.sandbox.process import Sandbox


@pytest.mark.usefixtures("all_guards")
@pytest.mark.parametrize(
    ("program", "limits", "stopped_by"),
    [
        ("while True: print('x' * 999)", SandboxLimits(output_bytes=5000), "output"),
        (
            "import sys\nwhile True: sys.stderr.write('x' * 999)",
            SandboxLimits(output_bytes=5000),
            "output",
        ),
        ("while True: pass", replace(LIMITS, wall_s=30), "cpu"),
        ("import time; time.sleep(60)", SHORT_WALL_LIMIT, "wall"),
        (
            "import signal\nsignal.signal(15, 1)\nwhile True: signal.pause()",
            SHORT_WALL_LIMIT,
            "wall",
        ),
        (
            "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nsignal.pause()",
            SHORT_WALL_LIMIT,
            "wall",
        ),
    ],
)
def test_a_program_is_killed_at_its_limit(program, limits, stopped_by):
    started = time.monotonic()
    outcome = run(program, limits)
    assert outcome.exit.stopped_by == stopped_by, outcome
    assert max(len(outcome.stdout), len(outcome.stderr)) <= limits.output_bytes
    assert time.monotonic() - started < limits.wall_s + 2


@pytest.mark.usefixtures("all_guards")
def test_no_way_to_allocate_memory_exceeds_the_limit():
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


@pytest.mark.usefixtures("all_guards")
def test_the_size_of_the_scratch_folder_is_limited():
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


def write_while_running(program: str, limits: SandboxLimits) -> bytes:
    """Run a program and return what it and its children wrote to a pipe until all closed it.

    A process that outlives its sandbox keeps the pipe open, which raises an AssertionError.
    """
    read_fd, write_fd = os.pipe()
    with os.fdopen(read_fd, "rb", buffering=0) as reader, Path(os.devnull).open("wb") as null:
        with os.fdopen(write_fd, "wb") as writer:
            sandbox = Sandbox(limits, frozenset(), [writer.fileno(), null.fileno()])
            with sandbox:
                writer.close()
                sandbox.start("script", {"program": dedent(program)})
                sandbox.wait()
        written = b""
        while select.select([reader], [], [], 2)[0]:
            chunk = reader.read(1 << 16)
            if not chunk:
                return written
            written += chunk
    raise AssertionError("a process outlived its sandbox")


@pytest.mark.usefixtures("all_guards")
@pytest.mark.parametrize(
    ("program", "max_distinct_writes"),
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
def test_processes_are_few_and_end_with_the_program(program, max_distinct_writes):
    started = time.monotonic()
    written = write_while_running(program, SandboxLimits(wall_s=1, processes=4))
    assert time.monotonic() - started < 5
    assert len(set(written.split())) <= max_distinct_writes


@pytest.mark.usefixtures("all_guards")
def test_ordinary_programs_can_use_the_standard_library():
    outcome = run("""
        import asyncio, concurrent.futures, hashlib, json, sqlite3, ssl, tempfile, uuid
        print("", file=open("/dev/null", "w"))
        with tempfile.TemporaryFile() as file: file.write(b"x")
        with concurrent.futures.ThreadPoolExecutor(2) as pool: list(pool.map(print, "ab"))
        asyncio.run(asyncio.sleep(0))
    """)
    assert (outcome.stdout, outcome.stderr) == ("a\nb\n", "")


@pytest.mark.usefixtures("all_guards")
def test_stdin_is_empty():
    assert run("import sys; print(repr(sys.stdin.read()))").stdout == "''\n"


@pytest.mark.usefixtures("all_guards")
def test_invalid_utf8_in_the_output_is_replaced():
    outcome = run("import os; os.write(1, b'\\xff\\xfea' + '\u0301'.encode() * 1000)")
    assert outcome.stdout.startswith("\ufffd\ufffda")
    assert outcome.exit.returncode == 0


@pytest.mark.usefixtures("all_guards")
def test_runs_share_no_state_and_order_sets_alike():
    program = "import sys; print({'a', 'b', 'c'}, hasattr(sys, 'seen')); sys.seen = open('x', 'x')"
    assert len({run(program).stdout for _ in range(3)}) == 1


@pytest.mark.usefixtures("all_guards")
@pytest.mark.parametrize("ended", ["caller", "supervisor"])
def test_the_program_ends_with_its_caller_and_its_supervisor(ended):
    read_fd, write_fd = os.pipe()
    script = f"""
        import os, signal, threading
        from trans_peft.sandbox.process import Sandbox
        from trans_peft.sandbox.limits import SandboxLimits
        with Sandbox(SandboxLimits(), frozenset(), [{write_fd}, 2]) as sandbox:
            os.close({write_fd})
            program = "import time, ctypes; ctypes.CDLL(None).prctl(1, 0); print('on', flush=True)"
            sandbox.start("script", {{"program": program + "; time.sleep(60)"}})
            print(os.getpid() if {ended!r} == "caller" else sandbox._pid, flush=True)
            sandbox.wait()
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
