"""Names of files that are refused in base uploads."""

import re
from pathlib import PurePosixPath

__all__ = ["filename_problem"]

MAX_NAME_LENGTH = 1024

_PICKLES = frozenset({
    ".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth",
})  # fmt: skip
_CODE = frozenset({".dll", ".dylib", ".py", ".pyc", ".so"})


def filename_problem(name: str, *, allow_python: bool = False) -> str | None:
    """Return why a file of this name is refused, or None if it is accepted.

    `allow_python` accepts Python files, for readers that neither copy nor run them.
    """
    if allow_python and name.endswith(".py"):
        return _path_problem(name)
    return _path_problem(name) or _type_problem(name)


def _path_problem(name: str) -> str | None:
    if len(name) > MAX_NAME_LENGTH:
        return f"{name[:40]!r}...: {len(name)} characters; at most {MAX_NAME_LENGTH} are allowed"
    if not name.isprintable():
        return f"{name!a}: control characters or invisible ones in the name"
    if "\\" in name or re.match("[A-Za-z]:", name):
        return f"{name!r}: the name is not portable"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return f"{name!r}: the name has an empty part, '.' or '..', which could leave the prefix"
    return None


def _type_problem(name: str) -> str | None:
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        return f"{name}: pickle files run code when loaded; save the weights as safetensors"
    if suffix in _CODE:
        return f"{name}: remote code is never run; convert the model to a class of transformers"
    if path.name == "adapter_config.json":
        return f"{name}: transformers would load this adapter together with the base"
    return None
