"""Files on this machine: paths and `file://` URIs as an `ArtifactStore`.

The ETag of a file consists of its inode, size and modification time. It changes when the file is
replaced or written to, and is computed without reading the file.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import BinaryIO
from urllib.parse import unquote

from trans_peft.domain.places import Places
from trans_peft.errors import (
    AccessError,
    IntegrityError,
    NotFoundError,
    StoreError,
    map_exceptions,
)
from trans_peft.files import is_temporary, open_atomic
from trans_peft.ports import StoredFile

__all__ = ["ANYWHERE", "FileStore", "local_path"]

ANYWHERE = Places()


def local_path(uri: str) -> Path:
    """Return a path or a `file://` URI as a path. Raises StoreError for any other scheme."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return Path(uri)
    if scheme == "file" and rest.startswith("/"):
        return Path(unquote(rest))
    raise StoreError("not a local path", expected="a path or file:///path", found=uri)


class FileStore:
    """`ArtifactStore` on the local file system; reads in chunks of `chunk_bytes`.

    Every method raises AccessError for a path outside of `places`, after symbolic links and `..`
    are resolved.
    """

    def __init__(self, chunk_bytes: int = 1 << 20, *, places: Places = ANYWHERE) -> None:
        self.places = places
        self._chunk_bytes = chunk_bytes

    def list(self, prefix_uri: str) -> tuple[StoredFile, ...]:
        """Return all files below a folder, sorted by name; empty if there is no such folder."""
        root = self._path(prefix_uri)
        found = []
        with _mapped_errors(prefix_uri):
            for folder, _, names in os.walk(root):
                for path in (Path(folder, name) for name in names):
                    if is_temporary(path.name):
                        continue
                    if path.is_symlink():
                        self.places.check_path(path, str(path))
                    stat = path.stat()
                    if not S_ISREG(stat.st_mode):
                        continue  # a pipe, a socket or a device holds no bytes of an upload
                    name = path.relative_to(root).as_posix()
                    found.append(StoredFile(name, stat.st_size, _etag(stat)))
        return tuple(sorted(found, key=lambda file: file.name))

    def read(
        self, uri: str, *, etag: str | None = None, start: int = 0, stop: int | None = None
    ) -> AbstractContextManager[Iterator[bytes]]:
        """Stream the bytes [start, stop) of one file in chunks.

        Raises NotFoundError, IntegrityError if the ETag differs or the file changes while it is
        read, StoreError if the file ends early.
        """
        return self._read(uri, etag, start, stop)

    @contextmanager
    def _read(
        self, uri: str, etag: str | None, start: int, stop: int | None
    ) -> Iterator[Iterator[bytes]]:
        path = self._path(uri)
        with _mapped_errors(uri):
            file = _open_regular(path, uri)
        with file:
            stat = os.fstat(file.fileno())
            if etag is not None and _etag(stat) != etag:
                raise _changed(uri, expected=etag, found=_etag(stat))
            file.seek(start)
            wanted = (stat.st_size if stop is None else stop) - start
            yield self._chunks(file, uri, stat, wanted)

    def _chunks(
        self, file: BinaryIO, uri: str, stat: os.stat_result, wanted: int
    ) -> Iterator[bytes]:
        size, etag = stat.st_size, _etag(stat)
        with _mapped_errors(uri):
            while wanted > 0 and (chunk := file.read(min(self._chunk_bytes, wanted))):
                wanted -= len(chunk)
                yield chunk
            missing = min(wanted, size - file.tell())
            now = _etag(self._path(uri).stat())
        if now != etag:
            raise _changed(uri, expected=etag, found=now)
        if missing > 0:
            raise StoreError(
                f"{uri} is shorter than the file system reports",
                expected=f"{size} bytes",
                found=f"{size - missing} bytes",
                do="check its file system, and try again",
            )

    def _path(self, uri: str) -> Path:
        path = local_path(uri)
        real = self.places.check_path(path, uri)
        # Without a list of places the path is not resolved, so that a link to a folder stays.
        return path if self.places.folders is None else real

    def write(self, uri: str, data: BinaryIO) -> None:
        """Write one file atomically. Raises StoreError."""
        path = self._path(uri)
        with _mapped_errors(uri), open_atomic(path) as file:
            while chunk := data.read(self._chunk_bytes):
                file.write(chunk)

    def remove(self, uri: str) -> None:
        """Remove one file. Does nothing if there is none. Raises StoreError."""
        path = self._path(uri)
        with _mapped_errors(uri):
            path.unlink(missing_ok=True)


def _open_regular(path: Path, uri: str) -> BinaryIO:
    """Open a file; StoreError for a named pipe, which would block until something writes to it."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if S_ISDIR(mode):
        raise IsADirectoryError(path)
    raise StoreError(
        f"{uri} is not a regular file",
        found="a named pipe, a socket or a device",
        do="copy the data into a file",
    )


def _etag(stat: os.stat_result) -> str:
    return f"{stat.st_ino:x}-{stat.st_size:x}-{stat.st_mtime_ns:x}"


def _changed(uri: str, *, expected: str, found: str) -> IntegrityError:
    return IntegrityError(f"{uri} changed", expected=f"ETag {expected}", found=found)


def _mapped_errors(uri: str) -> AbstractContextManager[None]:
    """Translate errors of the operating system about a file."""
    missing = NotFoundError(f"there is no file {uri}")
    return map_exceptions(
        {
            FileNotFoundError: lambda _: missing,
            NotADirectoryError: lambda _: missing,
            IsADirectoryError: lambda _: missing,
            PermissionError: lambda e: AccessError(
                f"{uri} cannot be used: {e.strerror}",
                do="change its permissions, or run as a user who has them",
            ),
            OSError: lambda e: StoreError(f"{uri} cannot be used: {e.strerror or e}"),
        }
    )
