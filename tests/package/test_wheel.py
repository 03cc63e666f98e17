"""The wheel, installed alone into an empty environment, as `pip install .` does."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.tiny import write_tiny_base

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.wheel, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """Return the interpreter of an environment that holds the wheel and its dependencies only."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, because setuptools leaves build/ in its source
    source.mkdir()
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "trans_peft", source / "trans_peft", ignore=shutil.ignore_patterns("__pycache__")
    )
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    _run(
        python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source,
    )  # fmt: skip
    (wheel,) = folder.glob("trans_peft-*.whl")
    _install(python, "--constraint", ROOT / "constraints.txt", wheel)
    return python


def _install(python: Path, *arguments: str | Path) -> None:
    """Install with uv, which links what it has installed before, or with pip without an index."""
    uv = [Path(sys.prefix, "bin", "uv"), "pip", "install", "--quiet", "--python", python]
    if subprocess.run([*uv, *arguments], check=False).returncode:
        _run(python, "-m", "pip", "install", "--quiet", *arguments)


def test_only_what_perturbed_needs_is_installed(python):
    listed = _run(python, "-m", "pip", "list", "--format=freeze").lower()
    names = {line.partition("==")[0].replace("_", "-") for line in listed.splitlines()}
    assert {"torch", "transformers", "peft", "numpy", "trans-peft"} <= names
    assert not {"trl", "mlflow", "prefect", "boto3", "scipy", "cyclopts", "datasets"} & names


def test_the_wheel_carries_its_licence_and_its_types(python):
    shown = _run(python, "-m", "pip", "show", "--files", "trans-peft")
    assert "licenses/LICENSE" in shown
    assert "trans_peft/py.typed" in shown
    assert "tests/" not in shown
    assert "flows/" not in shown


def test_the_example_of_the_readme_trains_an_adapter(python, tmp_path):
    write_tiny_base(tmp_path / "base")
    example = ROOT / "examples" / "plain_loop.py"
    printed = _run(python, example, tmp_path / "base", tmp_path / "adapter", cwd=tmp_path)
    assert printed.count("loss") == 8
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_command_line_names_the_extra_that_it_needs(python):
    command = python.parent / "trans-peft"
    ran = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert ran.returncode == 3
    assert "pip install '.[cli]'" in ran.stderr
    assert "Traceback" not in ran.stderr


def _run(*command: object, cwd: Path | None = None) -> str:
    ran = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout
