"""Read the Python source of the standard library and of dependencies, as text for data sets.

The list of packages is fixed, so an additional package in the environment changes nothing. Other
versions of the same packages change the text. Tests and vendored copies are excluded.
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
EXCLUDED = re.compile(
    r"(^|/)(tests?|testing|conftest|_vendor|vendored|idlelib|lib2to3|site-packages|__pycache__|protos)/"
    r"|(^|/)test_[^/]*$|_pb2(_grpc)?\.py$"
)
MAX_BYTES = 400_000  # longer files contain data


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
    """Yield every file, sorted by name. Files that are not UTF-8 are excluded."""
    stdlib, site = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    for package, folder in sorted({"stdlib": stdlib, **{p: site / p for p in PACKAGES}}.items()):
        files = ((file.relative_to(folder).as_posix(), file) for file in folder.rglob("*.py"))
        for name, file in sorted(files):
            if EXCLUDED.search(name) or file.stat().st_size > MAX_BYTES:
                continue
            try:
                yield SourceFile(f"{package}/{name}", file.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                continue


def rank(name: str, seed: int) -> float:
    """Return a pseudorandom number in [0, 1) that depends only on the name and the seed."""
    return int.from_bytes(sha256(f"{seed}/{name}".encode()).digest()[:8]) / 2**64


_FIELDS = re.compile(r"\{[^{}]*\}|%\(\w+\)[a-z]|%[-+# 0-9.]*[a-zA-Z]")
_QUOTED = re.compile(r"`[^`\n]*`|'[^'\n]*'|\"[^\"\n]*\"")


def words(text: str, *, drop_quoted: bool = False) -> tuple[str, ...]:
    """Return the words of a text in lower case, to compare texts: those of two or more letters.

    Placeholders, digits and punctuation are dropped; with `drop_quoted` also everything in quotes
    or backticks. Two texts with equal words count as the same text.
    """
    text = _FIELDS.sub(" ", text)
    if drop_quoted:
        text = _QUOTED.sub(" ", text)
    return tuple(re.findall(r"[a-z]{2,}", text.lower()))


def jaccard(a: Iterable[str], b: Iterable[str]) -> float:
    """Return the Jaccard index of two sets of words, in [0, 1]."""
    a, b = set(a), set(b)
    return len(a & b) / len(a | b) if a | b else 1.0
