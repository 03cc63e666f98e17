"""The devices of a test, and what a test needs beside a GPU."""

from importlib.util import find_spec

import pytest

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def on_gpu(package: str = ""):
    """Return the marks of a case that needs a GPU, and a package that `make gpu` installs."""
    marks = [pytest.mark.gpu]
    if package:
        missing = find_spec(package) is None
        marks.append(pytest.mark.skipif(missing, reason=f"needs the package {package}"))
    return marks
