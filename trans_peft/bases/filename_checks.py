"""File names that no base upload may have, whatever is in the files."""

import re
from pathlib import PurePosixPath

__all__ = ["filename_problem"]

MAX_NAME_LENGTH = 1024

_PICKLES = frozenset({
    ".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth",
})  # fmt: skip
_CODE = frozenset({".dll", ".dylib", ".py", ".pyc", ".so"})


def filename_problem(name: str, *, code_is_left_out: bool = False) -> str | None:
    """Return why a file of that name is refused, None if it is not.

    `code_is_left_out`: Python files may lie there, because the reader leaves them where they are.
    """
    if code_is_left_out and name.endswith(".py"):
        return _climbs(name)
    return _climbs(name) or _unwanted(name)


def _climbs(name: str) -> str | None:
    if len(name) > MAX_NAME_LENGTH:
        return f"{name[:40]!r}...: a name of {len(name)} characters"
    if not name.isprintable():
        return f"{name!a}: control characters, or invisible ones, in the name"
    if "\\" in name or re.match("[A-Za-z]:", name):
        return f"{name!r}: no portable name"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return f"{name!r}: the name leads out of the prefix"
    return None


def _unwanted(name: str) -> str | None:
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        return f"{name}: pickle weights run code when they are loaded; save them as safetensors"
    if suffix in _CODE:
        return f"{name}: code; remote code is never run, convert the model to a built-in class"
    if path.name == "adapter_config.json":
        return f"{name}: transformers would load that adapter together with the base"
    return None
