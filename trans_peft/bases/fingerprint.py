"""Compute the fingerprint of a base from streams, without torch and without weights in memory.

`scan` reads each file of a prefix once. It returns both the fields of a manifest (size, sha256) and
the fingerprint; `fingerprint` returns the fingerprint alone. The digest does not depend on
sharding, on the order of tensors in a file or on the library that saved it. It changes with every
element of every weight.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from trans_peft.artifacts import child_uri
from trans_peft.bases.checkpoint import Checkpoint
from trans_peft.bases.model_files import ModelFiles, affects_outputs
from trans_peft.domain.base import Fingerprint, ManifestFile
from trans_peft.errors import IntegrityError, NotFoundError, StoreError, UploadError, listed
from trans_peft.ports import ArtifactStore, StoredFile

__all__ = [
    "ByteProgress",
    "FileReader",
    "Scan",
    "fingerprint",
    "folder_file_reader",
    "reader",
    "scan",
]

_CHUNK_BYTES = 1 << 20

ByteProgress = Callable[[int, int], None]
"""A callback with the number of bytes read so far, and of all bytes."""

FileReader = Callable[[StoredFile], AbstractContextManager[Iterator[bytes]]]
"""A function that opens one file as a stream of chunks."""


@dataclass(frozen=True)
class Scan:
    """The result of reading all files of a prefix once.

    Attributes:
        files: size and sha256 of the files.
        fingerprint: None if there are problems.
        problems: all reasons why the files are not a base.
        changed: names of files that changed after they were listed; the other fields are then
            meaningless.
        checkpoint: None if there are problems.
    """

    files: tuple[ManifestFile, ...]
    fingerprint: Fingerprint | None
    problems: tuple[str, ...]
    changed: tuple[str, ...] = ()
    checkpoint: Checkpoint | None = None


def fingerprint(
    uri: str, store: ArtifactStore, *, on_progress: ByteProgress | None = None
) -> Fingerprint:
    """Return the fingerprint of the Hugging Face folder at a path or URI.

    Raises NotFoundError if there are no files, UploadError with all problems of the files,
    IntegrityError if they change while they are read.
    """
    files = store.list(uri)
    if not files:
        raise NotFoundError(f"there are no files below {uri}")
    relevant = [file for file in files if affects_outputs(file.name)]
    found = scan(relevant, reader(uri, store), on_progress=on_progress)
    if found.changed:
        raise IntegrityError(
            f"the files at {uri} changed while they were being read",
            found=f"a new version of {listed(found.changed)}",
            do="try again when no process writes there",
        )
    if found.fingerprint is None:
        raise UploadError("\n  - ".join([f"{uri} has no fingerprint:", *found.problems]))
    return found.fingerprint


def reader(uri: str, store: ArtifactStore) -> FileReader:
    """Return a reader of files listed below a prefix, bound to the ETags of the listing."""
    return lambda file: store.read(child_uri(uri, file.name), etag=file.etag)


def folder_file_reader(folder: Path) -> FileReader:
    """Return a reader of files in a local folder."""

    @contextmanager
    def read(file: StoredFile) -> Iterator[Iterator[bytes]]:
        with (folder / file.name).open("rb") as opened:
            yield iter(lambda: opened.read(_CHUNK_BYTES), b"")

    return read


def scan(
    files: Iterable[StoredFile], read: FileReader, *, on_progress: ByteProgress | None = None
) -> Scan:
    """Read each of the files once.

    Needs memory for the JSON files and one chunk. All problems of the files are listed in the
    result. Errors of `read` are raised, except that files for which it raises NotFoundError or
    IntegrityError are listed in `changed`.
    """
    files = tuple(files)
    total, done = sum(file.size for file in files), 0
    model, hashes, changed = ModelFiles(), [], []

    def count(read_bytes: int) -> None:
        nonlocal done
        done += read_bytes
        if on_progress is not None:
            on_progress(done, total)

    for file in files:
        try:
            with read(file) as chunks:
                hashes.append(_read_file(file, chunks, model, count))
        except (IntegrityError, NotFoundError):
            changed.append(file.name)
    if changed:
        return Scan(tuple(hashes), None, tuple(model.problems), tuple(changed))
    found = model.fingerprint()
    return Scan(tuple(hashes), found, tuple(model.problems), checkpoint=model.checkpoint)


def _read_file(
    file: StoredFile, chunks: Iterator[bytes], model: ModelFiles, count: Callable[[int], None]
) -> ManifestFile:
    sha256, size = hashlib.sha256(), 0

    def hashed() -> Iterator[bytes]:
        nonlocal size
        for chunk in chunks:
            sha256.update(chunk)
            size += len(chunk)
            count(len(chunk))
            yield chunk

    stream = hashed()
    model.take(file, stream)
    for _ in stream:  # the rest, which `take` did not read: the hash covers the whole file
        pass
    if size != file.size:
        raise StoreError(
            f"{file.name} was read with a different size than listed",
            expected=f"{file.size} bytes",
            found=f"{size} bytes",
            do="try again; check for a proxy that truncates responses",
        )
    return ManifestFile(file.name, size, sha256.hexdigest())
