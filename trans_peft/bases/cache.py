"""This worker's verified copies of bases: `<cache>/<digest>/`, a folder that transformers loads.

The name of a copy is the fingerprint of its content, so a copy is never out of date and is shared
by every family and version with the same bytes. It holds the files that the fingerprint covers and
no others: what came into the prefix after it was verified cannot get in here.

    <digest>/       a copy, whole: it gets this name after every byte of it was verified
    <digest>.json   its seal: size, times and inode of each file when its bytes were last hashed
    <digest>.part/  a download under way, or broken off (`ranges`)
    <digest>.use    locked (shared) by each process that uses the copy; touched at each use
    <digest>.lock   locked by the process that fetches or mends it
"""

import errno
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from trans_peft.bases.eviction import evict
from trans_peft.bases.filename_checks import filename_problem
from trans_peft.bases.fingerprint import ByteProgress, Scan, folder_file_reader, scan
from trans_peft.bases.model_files import affects_outputs
from trans_peft.bases.ranges import RANGE_BYTES, Partial, fetching
from trans_peft.bases.upload import read_manifest
from trans_peft.domain.base import Fingerprint
from trans_peft.errors import IntegrityError, NotFoundError, StoreError, UploadError
from trans_peft.ports import ArtifactStore, StoredFile

__all__ = ["download", "model_files"]

_TRUSTED_S = 7 * 24 * 3600.0
"""After so long a copy is hashed again, whatever its files' times say: disks forget."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def download(
    uri: str,
    store: ArtifactStore,
    cache_dir: Path,
    *,
    fingerprint: Fingerprint,
    limit_bytes: int | None = None,
    range_bytes: int = RANGE_BYTES,
    on_progress: ByteProgress | None = None,
) -> Path:
    """Return the folder of a base's verified copy, fetching it first where it is not there yet.

    One caller fetches, the others wait for it; one that was killed leaves nothing behind that is
    taken for a copy, and the next reads only what is missing. The copy is this process's until it
    ends. Copies that no process uses make room, oldest use first, where all together would exceed
    `limit_bytes` or the disk; a single base is always fetched. Raises NotFoundError; StoreError,
    also for a full disk (then the unfinished download is removed); IntegrityError if the files are
    no longer those of the fingerprint.
    """
    copy = _Copy(Path(cache_dir), fingerprint)
    if copy.folder.is_symlink():  # a folder of the user's own, fingerprinted a moment ago
        return copy.folder
    with _in_words(copy):
        copy.cache_dir.mkdir(parents=True, exist_ok=True)
        _use_until_the_end(copy.path("use"))
        if not copy.is_whole():
            with FileLock(copy.path("lock")):
                if not (copy.is_whole() or copy.is_mended()):
                    _fetch(uri, store, copy, limit_bytes, range_bytes, on_progress)
    return copy.folder


@dataclass(frozen=True)
class _Copy:
    """Where one base's copy is, or is going to be."""

    cache_dir: Path
    fingerprint: Fingerprint

    @property
    def folder(self) -> Path:
        return self.cache_dir / self.fingerprint.digest

    def path(self, kind: str) -> Path:
        return self.cache_dir / f"{self.fingerprint.digest}.{kind}"

    def is_whole(self) -> bool:
        """Whether the files are those that were hashed, as far as the file system can tell."""
        try:
            seal = json.loads(self.path("json").read_text())
            age_s = time.time() - seal["hashed_s"]
            return 0 <= age_s < _TRUSTED_S and seal["files"] == _stats(self.folder)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def is_mended(self) -> bool:
        """Hash a copy without a valid seal and seal it; one with other bytes is removed."""
        if not self.folder.is_dir():
            return False
        files = [StoredFile(name, stat[0], "") for name, stat in _stats(self.folder).items()]
        if self._is_right(scan(files, folder_file_reader(self.folder))):
            self.seal(self.folder)
            return True
        self.path("json").unlink(missing_ok=True)
        shutil.rmtree(self.folder)
        return False

    def seal(self, folder: Path) -> None:
        """Write down how the files look whose bytes were just hashed."""
        part = self.path("json.part")
        part.write_text(json.dumps({"hashed_s": time.time(), "files": _stats(folder)}))
        part.replace(self.path("json"))

    def _is_right(self, found: Scan) -> bool:
        return found.fingerprint is not None and found.fingerprint.digest == self.fingerprint.digest

    def check(self, found: Scan, uri: str) -> None:
        """Raise IntegrityError unless the files that were read are those of the fingerprint."""
        if not self._is_right(found):
            differences = found.problems or _differences(self.fingerprint, found.fingerprint)
            raise IntegrityError(
                f"the files at {uri} are no longer those that were made ready",
                expected=f"fingerprint {self.fingerprint.digest}",
                found=f"other files: {'; '.join(differences)}",
                do="restore them, or publish the new ones under a new version",
            )


def _fetch(
    uri: str,
    store: ArtifactStore,
    copy: _Copy,
    limit_bytes: int | None,
    range_bytes: int,
    on_progress: ByteProgress | None,
) -> None:
    partial = Partial(copy.path("part"))
    files = model_files(uri, store)
    try:
        with FileLock(copy.cache_dir / "room.lock"):
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
            if resumed:  # perhaps only what a crash left: it is not blamed on the upload
                return _fetch(uri, store, copy, limit_bytes, range_bytes, on_progress)
            raise
        _sync(partial.files)
        copy.seal(partial.files)
        partial.files.rename(copy.folder)
    except OSError as error:
        if error.errno in _FULL:
            partial.clear()
        raise
    partial.clear()


def model_files(uri: str, store: ArtifactStore) -> list[StoredFile]:
    """Return the files that count; of those, what came beside a manifest later does not."""
    there = store.list(uri)
    try:
        manifest = read_manifest(uri, store, there)
    except UploadError:  # somebody wrote another one: the fingerprint tells what became of the rest
        manifest = None
    stated = {file.name for file in manifest.files} if manifest else None
    files = [
        file
        for file in there
        if affects_outputs(file.name)
        and not filename_problem(file.name)
        and (stated is None or file.name in stated)
    ]
    if not files:
        raise NotFoundError(f"there are no model files below {uri}")
    return files


_used: dict[Path, int] = {}
_using = threading.Lock()


def _use_until_the_end(path: Path) -> None:
    """Hold a shared lock as long as this process lives: the kernel takes it back, come what may."""
    with _using:
        if path not in _used:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(handle, fcntl.LOCK_SH)
            _used[path] = handle
        os.utime(path)


def _stats(folder: Path) -> dict[str, list[int]]:
    """Return name -> size, times and inode of every file: a write cannot leave all of it alone."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = path.stat()
        if not path.is_dir():
            name = path.relative_to(folder).as_posix()
            found[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    return found


def _sync(folder: Path) -> None:
    """Have the files on the disk before anything says that they are whole."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


@contextmanager
def _in_words(copy: _Copy) -> Iterator[None]:
    try:
        yield
    except (IntegrityError, StoreError):
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise StoreError(
                f"the disk of {copy.cache_dir} is full; the unfinished download was removed",
                found=str(error),
                do="free some room on it, or let the worker's state lie on a larger disk",
            ) from error
        raise StoreError(f"the cache {copy.cache_dir} cannot be used: {error}") from error


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
