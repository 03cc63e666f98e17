"""Files of adapters that were downloaded for the mixed evaluation of a shard.

The transfers of the shard follow in the same process and need the same files.
"""

import shutil
import tempfile
from functools import cache
from pathlib import Path

from trans_peft.domain.adapter import AdapterVersion
from trans_peft.ports import Platform

__all__ = ["MAX_BYTES", "download", "keep"]

MAX_BYTES = 2 << 30
"""Maximum size of all kept files. The oldest ones are removed first."""

_Key = tuple[str, int, str]

_kept: dict[_Key, tuple[Path, int]] = {}
"""Folders and their sizes by adapter, number of the version and hash of the weights."""


def keep(version: AdapterVersion, folder: Path) -> None:
    """Move the downloaded files of a version to a temporary folder, for the next `download`."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > MAX_BYTES or _key(version) in _kept:
        return
    while sum(other for _, other in _kept.values()) > MAX_BYTES - size:
        oldest, _ = _kept.pop(next(iter(_kept)))
        shutil.rmtree(oldest)
    place = tempfile.mkdtemp(dir=_folder().name)
    _kept[_key(version)] = (Path(shutil.move(folder, place)), size)


def download(version: AdapterVersion, folder: Path, platform: Platform) -> Path:
    """Write the files of a version to a new folder: kept ones, or else those of the registry."""
    kept = _kept.pop(_key(version), None)
    if kept is None:
        return platform.registry.download(version, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(kept[0], folder))


def _key(version: AdapterVersion) -> _Key:
    return version.adapter, version.number, version.weights_sha256


@cache
def _folder() -> "tempfile.TemporaryDirectory[str]":
    """Return the folder of this process, which is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="trans-peft-")
