"""Evict base models from a worker's cache, least recently used first."""

import fcntl
import os
import re
import shutil
from pathlib import Path

from trans_peft.errors import StoreError

__all__ = ["evict"]

_DIGEST = re.compile("[0-9a-f]{64}")


def evict(target: Path, size_bytes: int, written_bytes: int, limit_bytes: int | None) -> None:
    """Remove copies that no process uses until one of `size_bytes` fits at `target`.

    It fits if all copies and downloads together have at most `limit_bytes` (None: no limit), and if
    the disk has space for the rest of it, `written_bytes` of it being written already. Copies in
    use stay. The limit may therefore be exceeded: the new base is admitted in any case. Raises
    StoreError if the disk has too little space.
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
            f"the disk of {target.parent} has too little space for this base",
            expected=f"{size_bytes - written_bytes:,} bytes",
            found=f"{free:,} bytes free, after all copies that no process uses were removed",
            do="free space on it, or move the state of the worker to a larger disk",
        )


def _digests(cache_dir: Path) -> set[str]:
    """Return the digests of all copies and downloads; links, to folders of users, are left out."""
    return {
        path.name[:64]
        for path in cache_dir.iterdir()
        if _DIGEST.match(path.name) and path.name[64:] in ("", ".part") and not path.is_symlink()
    }


def _folders(cache_dir: Path, digest: str) -> tuple[Path, Path]:
    return cache_dir / digest, cache_dir / f"{digest}.part"


def _size_bytes(cache_dir: Path, digest: str) -> int:
    """Return the size of a copy; a download has its final size from the start."""
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
    """Remove a copy unless a process uses it; its record first, so that no part looks verified."""
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
