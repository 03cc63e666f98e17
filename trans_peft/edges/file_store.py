"""Files on this machine: paths and `file://` URIs as an `ArtifactStore`.

The ETag of a file is made of its inode, size and modification time: enough to notice that a file
was replaced or written to, without reading it.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from trans_peft.domain.places import Places
from trans_peft.errors import IntegrityError, NotFoundError, StoreError
from trans_peft.ports import StoredFile

__all__ = ["ANYWHERE", "FileStore", "local_path"]

ANYWHERE = Places()
_PART_PREFIX, _PART_SUFFIX = ".trans-peft-", ".part"


def local_path(uri: str) -> Path:
    """Return the path that a path or a `file://` URI means. StoreError for any other scheme."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return Path(uri)
    if scheme == "file" and rest.startswith("/"):
        return Path(unquote(rest))
    raise StoreError("this is no local file", expected="a path or file:///path", found=uri)


class FileStore:
    """`ArtifactStore` on the local file system; reads in chunks of `chunk_bytes`.

    Paths outside of `places` are an AccessError, also where a symbolic link or `..` leads there.
    """

    def __init__(self, chunk_bytes: int = 1 << 20, *, places: Places = ANYWHERE) -> None:
        self.places = places
        self._chunk_bytes = chunk_bytes

    def list(self, prefix_uri: str) -> tuple[StoredFile, ...]:
        """Return every file below the folder, sorted by name; empty where there is no folder."""
        root = self._path(prefix_uri)
        found = []
        with _in_words(prefix_uri):
            for folder, _, names in os.walk(root):
                for path in (Path(folder, name) for name in names):
                    if _is_part(path):
                        continue
                    if path.is_symlink():
                        self.places.check_path(path, str(path))
                    stat = path.stat()
                    name = path.relative_to(root).as_posix()
                    found.append(StoredFile(name, stat.st_size, _etag(stat)))
        return tuple(sorted(found, key=lambda file: file.name))

    def read(
        self, uri: str, *, etag: str | None = None, start: int = 0, stop: int | None = None
    ) -> AbstractContextManager[Iterator[bytes]]:
        """Stream the bytes [start, stop) of one file in chunks.

        NotFoundError; IntegrityError if it changed or changes.
        """
        return self._read(uri, etag, start, stop)

    @contextmanager
    def _read(
        self, uri: str, etag: str | None, start: int, stop: int | None
    ) -> Iterator[Iterator[bytes]]:
        path = self._path(uri)
        with _in_words(uri):
            file = path.open("rb")
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
        with _in_words(uri):
            while wanted > 0 and (chunk := file.read(min(self._chunk_bytes, wanted))):
                wanted -= len(chunk)
                yield chunk
            missing = min(wanted, size - file.tell())
            now = _etag(self._path(uri).stat())
        if now != etag:
            raise _changed(uri, expected=etag, found=now)
        if missing > 0:
            raise StoreError(
                f"{uri} ends before its size",
                expected=f"{size} bytes",
                found=f"{size - missing} bytes",
                do="check the file system that it lies on, and try again",
            )

    def _path(self, uri: str) -> Path:
        path = local_path(uri)
        # Without a list of places, a path stays as it was named: a folder may be a link.
        return path if self.places.folders is None else self.places.check_path(path, uri)

    def write(self, uri: str, data: BinaryIO) -> None:
        """Write one file through a temporary one beside it: whole or not at all."""
        path = self._path(uri)
        with _in_words(uri):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(
                dir=path.parent, prefix=_PART_PREFIX, suffix=_PART_SUFFIX
            )
            part = Path(name)
            try:
                with os.fdopen(handle, "wb") as file:
                    while chunk := data.read(self._chunk_bytes):
                        file.write(chunk)
                    file.flush()
                    os.fsync(file.fileno())
                part.chmod(0o644)
                part.replace(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise


def _is_part(path: Path) -> bool:
    return path.name.startswith(_PART_PREFIX) and path.name.endswith(_PART_SUFFIX)


def _etag(stat: os.stat_result) -> str:
    return f"{stat.st_ino:x}-{stat.st_size:x}-{stat.st_mtime_ns:x}"


def _changed(uri: str, *, expected: str, found: str) -> IntegrityError:
    return IntegrityError(f"{uri} changed", expected=f"ETag {expected}", found=found)


@contextmanager
def _in_words(uri: str) -> Iterator[None]:
    """Turn what the operating system says about a file into our errors."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise NotFoundError(f"there is no file {uri}") from error
    except (IntegrityError, StoreError):
        raise
    except OSError as error:
        raise StoreError(f"{uri} cannot be used: {error.strerror or error}") from error
