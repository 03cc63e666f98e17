"""Address, read and copy the files of an `ArtifactStore`."""

from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from trans_peft.ports import ArtifactStore, StoredFile

__all__ = ["child_uri", "download_files", "read_file"]


def child_uri(prefix_uri: str, name: str) -> str:
    """Return the URI of a file below a prefix; only `file://` URIs are percent-encoded."""
    name = quote(name) if prefix_uri.startswith("file://") else name
    return f"{prefix_uri.rstrip('/')}/{name}"


def read_file(prefix_uri: str, file: StoredFile, store: ArtifactStore) -> bytes:
    """Return the content of a file that `store.list(prefix_uri)` returned.

    Raises NotFoundError, IntegrityError if the file has changed since, StoreError.
    """
    with store.read(child_uri(prefix_uri, file.name), etag=file.etag or None) as chunks:
        return b"".join(chunks)


def download_files(
    prefix_uri: str, files: Iterable[StoredFile], store: ArtifactStore, folder: Path
) -> None:
    """Write files that `store.list(prefix_uri)` returned below a folder, under the same names.

    Raises NotFoundError, IntegrityError if a file has changed since, StoreError.
    """
    for file in files:
        target = folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            store.read(child_uri(prefix_uri, file.name), etag=file.etag or None) as chunks,
            target.open("wb") as opened,
        ):
            opened.writelines(chunks)
