"""The tutorial of the documentation site runs as a program, on a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import write_tiny_base

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_tutorial_ends_with_an_adapter_that_serves_on_the_new_base(tmp_path):
    write_tiny_base(tmp_path / "base")
    environment = {
        **os.environ,
        "TUTORIAL_BASE": str(tmp_path / "base"),
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    ran = subprocess.run(
        [sys.executable, ROOT / "docs" / "tutorial.py"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "parity on v2 -> passed" in ran.stdout
    assert "serving: tutorial/v2" in ran.stdout
    assert ran.stdout.splitlines()[-1].startswith("v2 ")
