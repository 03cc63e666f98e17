"""One store for all URIs, which selects S3 or local files by the scheme."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from typing import BinaryIO

from trans_peft.domain.names import quoted
from trans_peft.domain.places import Places
from trans_peft.edges.file_store import ANYWHERE, FileStore
from trans_peft.errors import AccessError
from trans_peft.ports import ArtifactStore, StoredFile

__all__ = ["SchemeStore"]


class SchemeStore:
    """`ArtifactStore` for `s3://` URIs, paths and `file://` URIs. boto3 is imported only for S3.

    Every method raises AccessError for another scheme: a retry does not help.
    """

    def __init__(self, places: Places = ANYWHERE) -> None:
        self.places = places
        self._files = FileStore(places=places)

    @cached_property
    def _s3(self) -> ArtifactStore:
        from trans_peft.edges.s3_store import S3Store

        return S3Store()

    def list(self, prefix_uri: str) -> tuple[StoredFile, ...]:
        """Return all files below a prefix, sorted by name."""
        return self._store(prefix_uri).list(prefix_uri)

    def read(
        self, uri: str, *, etag: str | None = None, start: int = 0, stop: int | None = None
    ) -> AbstractContextManager[Iterator[bytes]]:
        """Stream the bytes [start, stop) of one file. See `ArtifactStore.read` for the errors."""
        return self._store(uri).read(uri, etag=etag, start=start, stop=stop)

    def write(self, uri: str, data: BinaryIO) -> None:
        """Write one file atomically."""
        self._store(uri).write(uri, data)

    def remove(self, uri: str) -> None:
        """Remove one file. Does nothing if there is none."""
        self._store(uri).remove(uri)

    def _store(self, uri: str) -> ArtifactStore:
        scheme, separator, _ = uri.partition("://")
        if scheme == "s3":
            return self._s3
        if scheme == "file" or not separator:
            return self._files
        raise AccessError(
            f"there is no store for the URI scheme {quoted(scheme)}",
            expected="s3://bucket/key, a path, or file:///path",
            found=quoted(uri, 200),
        )
