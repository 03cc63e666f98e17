"""Programs that the demo runs as child processes."""

import io

import pytest
from rich.console import Console

from demo.programs import Module, run_module
from demo.screen import DemoError, Screen


@pytest.fixture
def screen():
    return Screen(Console(file=io.StringIO(), width=200))


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Return a function that makes a module from its source."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(source):
        (tmp_path / "program.py").write_text(source)
        return ["program", "one argument"]

    return write


def test_the_output_is_shown(screen, programs):
    run_module(programs("import sys; print('started'); print(sys.argv[1])"), screen)
    shown = screen.console.file.getvalue()
    assert "started" in shown and "one argument" in shown


def test_a_program_that_fails_is_an_error_with_its_last_lines(screen, programs):
    with pytest.raises(DemoError, match="python -m program ended with exit code 3") as raised:
        run_module(programs("print('the reason'); raise SystemExit(3)"), screen)
    assert "the reason" in str(raised.value)


def test_a_program_runs_while_others_do(screen, programs, tmp_path):
    begun = tmp_path / "begun"
    source = f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); print('done')"
    with Module(programs(source)) as module:
        run_module(["timeit", "-n", "1", "pass"], screen)
        module.finish(screen)
    assert begun.exists()
    assert screen.console.file.getvalue().rstrip().endswith("done")


def test_an_error_meanwhile_ends_the_program(programs):
    with (
        pytest.raises(KeyboardInterrupt),
        Module(programs("import time; time.sleep(60)")) as module,
    ):
        raise KeyboardInterrupt
    assert module._process.returncode is not None
