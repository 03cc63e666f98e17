"""What an adapter can feel of a base, read as streams: no torch, no weights in memory.

`scan` reads each file of a prefix once and gives both what a manifest states (size, sha256) and the
fingerprint; `fingerprint` wants the latter alone. Sharding, the order of tensors in a file and the
library that saved it leave no trace in the digest; one changed element of one weight does.
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
"""Called with the bytes read so far and the bytes in all."""

FileReader = Callable[[StoredFile], AbstractContextManager[Iterator[bytes]]]
"""Opens one file as a stream of chunks."""


@dataclass(frozen=True)
class Scan:
    """One pass over a prefix. `fingerprint` and `checkpoint` are None where there are problems.

    `changed` names the files that were not those of the listing any more when they were read: then
    the rest says nothing either.
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

    Raises NotFoundError where there is nothing, UploadError with everything that is wrong with it,
    IntegrityError if it changes meanwhile.
    """
    files = store.list(uri)
    if not files:
        raise NotFoundError(f"there are no files below {uri}")
    felt = [file for file in files if affects_outputs(file.name)]
    found = scan(felt, reader(uri, store), on_progress=on_progress)
    if found.changed:
        raise IntegrityError(
            f"the files at {uri} changed while they were being read",
            found=f"another version of {listed(found.changed)}",
            do="try again when nobody writes there",
        )
    if found.fingerprint is None:
        raise UploadError("\n  - ".join([f"{uri} has no fingerprint:", *found.problems]))
    return found.fingerprint


def reader(uri: str, store: ArtifactStore) -> FileReader:
    """Return how the listed files below a prefix are read: none but the version that was listed."""
    return lambda file: store.read(child_uri(uri, file.name), etag=file.etag)


def folder_file_reader(folder: Path) -> FileReader:
    """Return how files of a folder on this machine are read."""

    @contextmanager
    def read(file: StoredFile) -> Iterator[Iterator[bytes]]:
        with (folder / file.name).open("rb") as opened:
            yield iter(lambda: opened.read(_CHUNK_BYTES), b"")

    return read


def scan(
    files: Iterable[StoredFile], read: FileReader, *, on_progress: ByteProgress | None = None
) -> Scan:
    """Read each of the files once.

    Memory: the JSON files and one chunk. What is wrong with the files is listed in `problems`, all
    of it; what `read` raises is raised, but for a file that is gone or another one.
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
                hashes.append(_pass_by(file, chunks, model, count))
        except (IntegrityError, NotFoundError):
            changed.append(file.name)
    if changed:
        return Scan(tuple(hashes), None, tuple(model.problems), tuple(changed))
    found = model.fingerprint()
    return Scan(tuple(hashes), found, tuple(model.problems), checkpoint=model.checkpoint)


def _pass_by(
    file: StoredFile, chunks: Iterator[bytes], model: ModelFiles, count: Callable[[int], None]
) -> ManifestFile:
    sha256, size = hashlib.sha256(), 0

    def passing() -> Iterator[bytes]:
        nonlocal size
        for chunk in chunks:
            sha256.update(chunk)
            size += len(chunk)
            count(len(chunk))
            yield chunk

    stream = passing()
    model.take(file, stream)
    for _ in stream:  # what the reader left: the hash covers the whole file
        pass
    if size != file.size:
        raise StoreError(
            f"{file.name} was read in another size than it is listed with",
            expected=f"{file.size} bytes",
            found=f"{size} bytes",
            do="try again; look for a proxy in between that shortens answers",
        )
    return ManifestFile(file.name, size, sha256.hexdigest())
