"""What an adapter can feel of a base, read as streams: no torch, no weights in memory.

`scan` reads each file of a prefix once and gives both what a manifest states (size, sha256) and the
fingerprint; `fingerprint` wants the latter alone. Sharding, the order of tensors in a file and the
library that saved it leave no trace in the digest; one changed element of one weight does.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from trans_peft.bases.model_files import ModelFiles, is_felt
from trans_peft.bases.uris import child_uri
from trans_peft.domain.base import Fingerprint, ManifestFile
from trans_peft.errors import IntegrityError, NotFoundError, UploadError
from trans_peft.ports import ArtifactStore, StoredFile

__all__ = ["Progress", "Reader", "Scan", "fingerprint", "reader", "scan"]

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and the bytes in all."""

Reader = Callable[[StoredFile], AbstractContextManager[Iterator[bytes]]]
"""Opens one file as a stream of chunks."""


@dataclass(frozen=True)
class Scan:
    """One pass over a prefix. `fingerprint` is None where there are problems."""

    files: tuple[ManifestFile, ...]
    fingerprint: Fingerprint | None
    problems: tuple[str, ...]


def fingerprint(
    uri: str, store: ArtifactStore, *, on_progress: Progress | None = None
) -> Fingerprint:
    """Return the fingerprint of the Hugging Face folder at a path or URI.

    Raises NotFoundError where there is nothing, UploadError with everything that is wrong with it.
    """
    files = store.list(uri)
    if not files:
        raise NotFoundError(f"there are no files below {uri}")
    felt = [file for file in files if is_felt(file.name)]
    found = scan(felt, reader(uri, store), on_progress=on_progress)
    if found.fingerprint is None:
        raise UploadError("\n  - ".join([f"{uri} has no fingerprint:", *found.problems]))
    return found.fingerprint


def reader(uri: str, store: ArtifactStore) -> Reader:
    """Return how the listed files below a prefix are read: none but the version that was listed."""
    return lambda file: store.read(child_uri(uri, file.name), etag=file.etag)


def scan(
    files: Iterable[StoredFile],
    read: Reader,
    *,
    copy_to: Path | None = None,
    on_progress: Progress | None = None,
) -> Scan:
    """Read each of the files once; copy them to a folder on the way where one is given.

    Memory: the JSON files and one chunk. What is wrong with the files is listed in `problems`, all
    of it; what `read` raises, IntegrityError aside, is raised.
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
                hashes.append(_pass_by(file, chunks, model, copy_to, count))
        except IntegrityError:
            changed.append(f"{file.name}: it changed while it was being read")
    found = model.fingerprint()
    return Scan(tuple(hashes), None if changed else found, (*changed, *model.problems))


def _pass_by(
    file: StoredFile,
    chunks: Iterator[bytes],
    model: ModelFiles,
    copy_to: Path | None,
    count: Callable[[int], None],
) -> ManifestFile:
    sha256, size = hashlib.sha256(), 0
    with ExitStack() as stack:
        copy = None
        if copy_to is not None:
            path = copy_to / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            copy = stack.enter_context(path.open("wb"))

        def passing() -> Iterator[bytes]:
            nonlocal size
            for chunk in chunks:
                sha256.update(chunk)
                size += len(chunk)
                if copy is not None:
                    copy.write(chunk)
                count(len(chunk))
                yield chunk

        stream = passing()
        model.take(file, stream)
        for _ in stream:  # what the reader left: the hash covers the whole file
            pass
    return ManifestFile(file.name, size, sha256.hexdigest())
