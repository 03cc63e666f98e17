"""The text on any machine that runs this: Python source of the standard library and dependencies.

A frozen list, so that an extra package in the environment changes nothing; other versions of the
same packages do. Tests and vendored copies are left out.
"""

import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

__all__ = ["SourceFile", "jaccard", "rank", "source_files", "words"]

PACKAGES = (
    "accelerate", "aiohttp", "alembic", "anyio", "botocore", "cryptography", "datasets", "docker",
    "fontTools", "fsspec", "git", "google", "graphql", "huggingface_hub", "jinja2", "joblib",
    "matplotlib", "mlflow", "mpmath", "networkx", "numpy", "pandas", "peft", "prefect", "pyarrow",
    "pydantic", "scipy", "sklearn", "sqlalchemy", "supervisor", "sympy", "torch", "transformers",
    "trl", "websockets",
)  # fmt: skip
LEFT_OUT = re.compile(
    r"(^|/)(tests?|testing|conftest|_vendor|vendored|idlelib|lib2to3|site-packages|__pycache__|protos)/"
    r"|(^|/)test_[^/]*$|_pb2(_grpc)?\.py$"
)
MAX_BYTES = 400_000  # longer files are tables of data


@dataclass(frozen=True)
class SourceFile:
    """One Python file: its name with the package first ("torch/nn/init.py"), and its text."""

    name: str
    text: str

    @property
    def package(self) -> str:
        """The first part of the name; "stdlib" for the standard library."""
        return self.name.partition("/")[0]


def source_files() -> Iterator[SourceFile]:
    """Yield every file, in the order of its name. Files that are not UTF-8 are left out."""
    stdlib, site = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    for package, folder in sorted({"stdlib": stdlib, **{p: site / p for p in PACKAGES}}.items()):
        files = ((file.relative_to(folder).as_posix(), file) for file in folder.rglob("*.py"))
        for name, file in sorted(files):
            if LEFT_OUT.search(name) or file.stat().st_size > MAX_BYTES:
                continue
            try:
                yield SourceFile(f"{package}/{name}", file.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                continue


def rank(name: str, seed: int) -> float:
    """Return a number in [0, 1) that the name and the seed decide: a draw without state."""
    return int.from_bytes(sha256(f"{seed}/{name}".encode()).digest()[:8]) / 2**64


_FIELDS = re.compile(r"\{[^{}]*\}|%\(\w+\)[a-z]|%[-+# 0-9.]*[a-zA-Z]")
_QUOTED = re.compile(r"`[^`\n]*`|'[^'\n]*'|\"[^\"\n]*\"")


def words(text: str, *, drop_quoted: bool = False) -> tuple[str, ...]:
    """Return what a text says apart from its details: words of two letters and more, lower case.

    Placeholders, digits and signs are dropped; with `drop_quoted` also everything in quotes or
    backticks. Two texts with equal words are one text to us.
    """
    text = _FIELDS.sub(" ", text)
    if drop_quoted:
        text = _QUOTED.sub(" ", text)
    return tuple(re.findall(r"[a-z]{2,}", text.lower()))


def jaccard(a: Iterable[str], b: Iterable[str]) -> float:
    """Return the share of two texts' different words that both have, in [0, 1]."""
    a, b = set(a), set(b)
    return len(a & b) / len(a | b) if a | b else 1.0
