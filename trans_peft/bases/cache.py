"""The worker's cache of verified base models: `<cache>/<digest>/`, folders for transformers.

A copy is named by the fingerprint of its content. It is therefore never out of date, and families
and versions with the same content share it. It contains only files that the fingerprint covers:
files that are added to the prefix after verification are not downloaded.

    <digest>/       a complete copy; renamed to this after all of its bytes were verified
    <digest>.json   verification record: size, times and inode of each file when it was last hashed
    <digest>.part/  an unfinished download (`ranges`)
    <digest>.use    locked (shared) by each process that uses the copy; touched at each use
    <digest>.lock   locked by the process that downloads or verifies it
"""

import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from trans_peft.bases.eviction import evict
from trans_peft.bases.filename_checks import filename_problem
from trans_peft.bases.fingerprint import ByteProgress, Scan, folder_file_reader, scan
from trans_peft.bases.model_files import affects_outputs
from trans_peft.bases.ranges import RANGE_BYTES, UnfinishedDownload, fetching
from trans_peft.bases.upload import read_manifest
from trans_peft.domain.base import Fingerprint
from trans_peft.errors import (
    IntegrityError,
    NotFoundError,
    StoreError,
    UploadError,
    is_full_disk,
    map_exceptions,
)
from trans_peft.files import atomic_write
from trans_peft.ports import ArtifactStore, StoredFile

__all__ = ["download", "model_files"]

_RECORD_LIFETIME_S = 7 * 24 * 3600.0
"""A copy is hashed again after this time, in case the disk has changed bytes silently."""


def download(  # noqa: PLR0913  four optional limits and callbacks
    uri: str,
    store: ArtifactStore,
    cache_dir: Path,
    *,
    fingerprint: Fingerprint,
    limit_bytes: int | None = None,
    range_bytes: int = RANGE_BYTES,
    on_progress: ByteProgress | None = None,
    on_found: Callable[[bool], None] = lambda found: None,
) -> Path:
    """Return the folder with the verified copy of a base; download it first if it is missing.

    One process downloads while the others wait. After a killed download, the next call reads only
    the missing ranges. This process holds the copy until it ends, so that it is not evicted. Copies
    that no process holds are removed, least recently used first, if all copies together would
    exceed `limit_bytes` or the disk; a single base is downloaded whatever the limit. `on_found` is
    called with whether the copy was there.

    Raises NotFoundError; StoreError, also for a full disk, after the unfinished download was
    removed; IntegrityError if the files no longer match the fingerprint.
    """
    copy = _Copy(Path(cache_dir), fingerprint)
    if copy.folder.is_symlink():  # a local folder of the user, which `cli` has just fingerprinted
        return copy.folder
    with _mapped_errors(copy):
        copy.cache_dir.mkdir(parents=True, exist_ok=True)
        _hold_until_exit(copy.path("use"))
        found = copy.is_verified()
        if not found:
            with FileLock(copy.path("lock")):
                found = copy.is_verified() or copy.verify_again()
                if not found:
                    _download(uri, store, copy, limit_bytes, range_bytes, on_progress)
    on_found(found)
    return copy.folder


@dataclass(frozen=True)
class _Copy:
    """The paths of one copy, which may not exist yet."""

    cache_dir: Path
    fingerprint: Fingerprint

    @property
    def folder(self) -> Path:
        return self.cache_dir / self.fingerprint.digest

    def path(self, kind: str) -> Path:
        return self.cache_dir / f"{self.fingerprint.digest}.{kind}"

    def is_verified(self) -> bool:
        """Whether a valid verification record shows that no file changed since it was hashed."""
        try:
            record = json.loads(self.path("json").read_text())
            age_s = time.time() - record["hashed_s"]
            return 0 <= age_s < _RECORD_LIFETIME_S and record["files"] == _stats(self.folder)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def verify_again(self) -> bool:
        """Hash a copy without a valid record. Write the record if it is correct, else remove it."""
        if not self.folder.is_dir():
            return False
        files = [StoredFile(name, stat[0], "") for name, stat in _stats(self.folder).items()]
        if self._matches(scan(files, folder_file_reader(self.folder))):
            self.write_record(self.folder)
            return True
        self.path("json").unlink(missing_ok=True)
        shutil.rmtree(self.folder)
        return False

    def write_record(self, folder: Path) -> None:
        """Record the size, times and inodes of the files that were just hashed."""
        record = {"hashed_s": time.time(), "files": _stats(folder)}
        atomic_write(self.path("json"), json.dumps(record))

    def _matches(self, found: Scan) -> bool:
        return found.fingerprint is not None and found.fingerprint.digest == self.fingerprint.digest

    def check(self, found: Scan, uri: str) -> None:
        """Raise IntegrityError unless the files that were read match the fingerprint."""
        if not self._matches(found):
            differences = found.problems or _differences(self.fingerprint, found.fingerprint)
            raise IntegrityError(
                f"the files at {uri} changed after the base was made ready",
                expected=f"fingerprint {self.fingerprint.digest}",
                found=f"differences: {'; '.join(differences)}",
                do="restore them, or publish the new ones under a new version",
            )


def _download(
    uri: str,
    store: ArtifactStore,
    copy: _Copy,
    limit_bytes: int | None,
    range_bytes: int,
    on_progress: ByteProgress | None,
) -> None:
    partial = UnfinishedDownload(copy.path("part"))
    files = model_files(uri, store)
    try:
        with FileLock(copy.cache_dir / "eviction.lock"):
            size = sum(file.size for file in files)
            evict(copy.folder, size, partial.bytes_written(uri, files), limit_bytes)
            missing = partial.prepare(uri, files, range_bytes)
        resumed = sum(item.stop - item.start for item in missing) < size
        with fetching(partial, missing, store) as read:
            found = scan(files, read, on_progress=on_progress)
        try:
            copy.check(found, uri)
        except IntegrityError:
            partial.clear()
            if resumed:  # ranges of an earlier process may be corrupt: read all of them again
                return _download(uri, store, copy, limit_bytes, range_bytes, on_progress)
            raise
        _sync(partial.files)
        copy.write_record(partial.files)
        partial.files.rename(copy.folder)
    except OSError as error:
        if is_full_disk(error):
            partial.clear()
        raise
    partial.clear()


def model_files(uri: str, store: ArtifactStore) -> list[StoredFile]:
    """Return the files that outputs depend on, without those that its manifest does not list."""
    listing = store.list(uri)
    try:
        manifest = read_manifest(uri, store, listing)
    except UploadError:  # replaced since verification: the fingerprint decides about the files
        manifest = None
    stated = {file.name for file in manifest.files} if manifest else None
    files = [
        file
        for file in listing
        if affects_outputs(file.name)
        and not filename_problem(file.name)
        and (stated is None or file.name in stated)
    ]
    if not files:
        raise NotFoundError(f"there are no model files below {uri}")
    return files


_use_locks: dict[Path, int] = {}
"""File descriptors that hold the shared locks of this process."""
_use_locks_guard = threading.Lock()


def _hold_until_exit(path: Path) -> None:
    """Hold a shared lock until this process ends; the kernel releases it even after a kill."""
    with _use_locks_guard:
        if path not in _use_locks:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(handle, fcntl.LOCK_SH)
            _use_locks[path] = handle
        os.utime(path)


def _stats(folder: Path) -> dict[str, list[int]]:
    """Return name -> size, times and inode of every file; any write changes one of them."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = path.stat()
        if not path.is_dir():
            name = path.relative_to(folder).as_posix()
            found[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    return found


def _sync(folder: Path) -> None:
    """Flush all files to the disk, before a record or a name declares them complete."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _mapped_errors(copy: _Copy) -> AbstractContextManager[None]:
    def cache_error(error: OSError) -> StoreError:
        if is_full_disk(error):
            return StoreError(
                f"the disk of {copy.cache_dir} is full; the unfinished download was removed",
                found=str(error),
                do="free space on it, or move the state of the worker to a larger disk",
            )
        return StoreError(f"the cache {copy.cache_dir} cannot be used: {error}")

    return map_exceptions({OSError: cache_error})


def _differences(expected: Fingerprint, found: Fingerprint | None) -> list[str]:
    if found is None:
        return []
    differing = [
        name
        for name in sorted(expected.tensors.keys() | found.tensors.keys())
        if expected.tensors.get(name) != found.tensors.get(name)
    ]
    parts = (
        "architecture",
        "layer_count",
        "config_sha256",
        "vocabulary_sha256",
        "tokenizer_sha256",
        "chat_template_sha256",
    )
    return [
        *(part for part in parts if getattr(expected, part) != getattr(found, part)),
        *([f"{len(differing)} weights, the first is {differing[0]}"] if differing else []),
    ]
