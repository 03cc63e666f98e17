"""Write files atomically, and new folders."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from trans_peft.errors import InvalidSpecError, StoreError

__all__ = ["atomic_write", "check_unused", "check_writable", "is_temporary", "open_atomic"]

_PREFIX, _SUFFIX = ".trans-peft-", ".part"


def atomic_write(path: Path, data: bytes | str, *, mode: int = 0o666) -> None:
    """Replace the file at `path`. Other processes see the old content or all of the new one.

    Text is encoded as UTF-8. The folder of `path` is created if it is missing. `mode` is the new
    file's permissions before the umask. Raises OSError.
    """
    with open_atomic(path, mode=mode) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def open_atomic(path: Path, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; when the block ends, sync it and rename it to `path`.

    If the block raises, the temporary file is removed and `path` stays as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_unused(folder: Path) -> None:
    """Raise InvalidSpecError unless the folder is new or empty, so that results do not mix."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InvalidSpecError(
            f"{folder} is not empty", expected="a new or empty folder", do="choose another folder"
        )
    check_writable(folder)


def check_writable(folder: Path) -> None:
    """Raise StoreError if files cannot be written to a folder, which may not exist yet."""
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise StoreError(
            f"results cannot be written to the folder {folder}",
            expected="a folder that this user may write to, or the path of a new one",
            found=f"{above} is {'read-only' if above.is_dir() else 'a file'}",
            do="choose another folder, or correct its permissions",
        )


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that `open_atomic` has not renamed yet."""
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX)
