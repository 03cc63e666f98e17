"""Room for one more base in a worker's cache: what no process uses goes, oldest use first."""

import fcntl
import os
import re
import shutil
from pathlib import Path

from trans_peft.errors import StoreError

__all__ = ["evict"]

_DIGEST = re.compile("[0-9a-f]{64}")


def evict(target: Path, size_bytes: int, written_bytes: int, limit_bytes: int | None) -> None:
    """Remove copies until one of `size_bytes` at `target` fits, `written_bytes` of it being there.

    It fits where all copies and downloads together stay within `limit_bytes` (None: no limit), and
    the rest of it on the disk. What some process uses stays, so the limit may be exceeded: whatever
    else there is, one base is always let in. Raises StoreError if the disk has too little room.
    """
    others = [digest for digest in _digests(target.parent) if digest != target.name]
    sizes = {digest: _size_bytes(target.parent, digest) for digest in others}
    excess = sum(sizes.values()) + size_bytes - limit_bytes if limit_bytes is not None else 0
    for digest in sorted(others, key=lambda digest: _last_use_s(target.parent, digest)):
        if excess <= 0 and size_bytes - written_bytes <= _free_bytes(target.parent):
            return
        if _remove_unused(target.parent, digest):
            excess -= sizes[digest]
    if size_bytes - written_bytes > (free := _free_bytes(target.parent)):
        raise StoreError(
            f"the disk of {target.parent} has no room for this base",
            expected=f"{size_bytes - written_bytes:,} bytes",
            found=f"{free:,} bytes free; every copy there that no process uses was removed",
            do="free some room on it, or let the worker's state lie on a larger disk",
        )


def _digests(cache_dir: Path) -> set[str]:
    """Return the digests of all copies and downloads; links lead to folders of the user's own."""
    return {
        path.name[:64]
        for path in cache_dir.iterdir()
        if _DIGEST.match(path.name) and path.name[64:] in ("", ".part") and not path.is_symlink()
    }


def _folders(cache_dir: Path, digest: str) -> tuple[Path, Path]:
    return cache_dir / digest, cache_dir / f"{digest}.part"


def _size_bytes(cache_dir: Path, digest: str) -> int:
    """Return the bytes of a copy, and of a download what it will have when it is done."""
    return sum(
        path.stat().st_size
        for folder in _folders(cache_dir, digest)
        for path in folder.rglob("*")
        if path.is_file()
    )


def _last_use_s(cache_dir: Path, digest: str) -> float:
    path = cache_dir / f"{digest}.use"
    return path.stat().st_mtime if path.exists() else 0.0


def _free_bytes(cache_dir: Path) -> int:
    return shutil.disk_usage(cache_dir).free


def _remove_unused(cache_dir: Path, digest: str) -> bool:
    """Remove a copy unless a process uses it; its seal first, so that no half looks whole."""
    handle = os.open(cache_dir / f"{digest}.use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (cache_dir / f"{digest}.json").unlink(missing_ok=True)
        for folder in _folders(cache_dir, digest):
            shutil.rmtree(folder, ignore_errors=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
