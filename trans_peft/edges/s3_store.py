"""Objects in S3, or in anything that speaks its protocol, as an `ArtifactStore`.

The one place that imports boto3. Credentials, region and endpoint come from where every AWS client
takes them (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, profiles, roles). A read is bound to the ETag
that was seen (`If-Match`), so what is verified and what is used are the same bytes.
"""

import builtins
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any, BinaryIO

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from trans_peft.errors import IntegrityError, NotFoundError, StoreError
from trans_peft.ports import StoredFile

__all__ = ["S3Store"]

_CONFIG = Config(
    connect_timeout=5,
    read_timeout=60,
    retries={"mode": "standard", "total_max_attempts": 4},
    user_agent_extra="trans-peft",
)
_TRANSFER = TransferConfig(multipart_threshold=16 << 20, multipart_chunksize=16 << 20)
_MOST_BREAKS = 5  # of one stream, in mid-flow
_MISSING = frozenset({"404", "NoSuchBucket", "NoSuchKey", "NotFound"})
_CHANGED = frozenset({"412", "PreconditionFailed"})


class S3Store:
    """`ArtifactStore` in S3; reads in chunks of `chunk_bytes`. Safe to share between threads."""

    def __init__(self, *, chunk_bytes: int = 1 << 20) -> None:
        self._chunk_bytes = chunk_bytes

    @cached_property
    def _client(self) -> Any:
        return boto3.session.Session().client("s3", config=_CONFIG)

    def list(self, prefix_uri: str) -> tuple[StoredFile, ...]:
        """Return every object below the prefix, sorted by name; folder markers are no objects."""
        bucket, prefix = _bucket_and_key(prefix_uri)
        prefix = f"{prefix.rstrip('/')}/" if prefix else ""
        found: builtins.list[StoredFile] = []
        with _in_words(prefix_uri):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=bucket, Prefix=prefix
            )
            for page in pages:
                for item in page.get("Contents", ()):
                    name = item["Key"].removeprefix(prefix)
                    if item["Size"] == 0 and (not name or name.endswith("/")):
                        continue
                    found.append(StoredFile(name, item["Size"], item["ETag"]))
        return tuple(sorted(found, key=lambda file: file.name))

    def read(self, uri: str, *, etag: str | None = None) -> AbstractContextManager[Iterator[bytes]]:
        """Stream one object in chunks. NotFoundError; IntegrityError if its ETag is another."""
        return self._read(uri, etag)

    @contextmanager
    def _read(self, uri: str, etag: str | None) -> Iterator[Iterator[bytes]]:
        with _in_words(uri):
            found = self._get(uri, **({"IfMatch": etag} if etag else {}))
        chunks = self._chunks(uri, found["Body"], found["ETag"])
        try:
            yield chunks
        finally:
            chunks.close()

    def _get(self, uri: str, **conditions: str) -> Any:
        bucket, key = _bucket_and_key(uri)
        return self._client.get_object(Bucket=bucket, Key=key, **conditions)

    def _chunks(self, uri: str, body: Any, etag: str) -> Generator[bytes, None, None]:
        """Read on where the connection broke off, but only from the same object."""
        position, breaks = 0, 0
        try:
            with _in_words(uri):
                while True:
                    try:
                        for chunk in body.iter_chunks(self._chunk_bytes):
                            position += len(chunk)
                            yield chunk
                        return
                    except BotoCoreError:
                        breaks += 1
                        if breaks > _MOST_BREAKS:
                            raise
                        body.close()
                        body = self._get(uri, IfMatch=etag, Range=f"bytes={position}-")["Body"]
        finally:
            body.close()

    def write(self, uri: str, data: BinaryIO) -> None:
        """Write one object, in parts where it is large; it is there whole or not at all."""
        bucket, key = _bucket_and_key(uri)
        with _in_words(uri):
            self._client.upload_fileobj(_Unclosed(data), bucket, key, Config=_TRANSFER)


class _Unclosed:
    """boto3 closes what it has uploaded; the file is the caller's to close."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)


def _bucket_and_key(uri: str) -> tuple[str, str]:
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise StoreError("this is no place in S3", expected="s3://bucket/key", found=uri)
    return bucket, key


@contextmanager
def _in_words(uri: str) -> Iterator[None]:
    """Turn what S3 and its client say into our errors."""
    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code in _MISSING:
            raise NotFoundError(f"there is no {uri}", found=code) from error
        if code in _CHANGED:
            raise IntegrityError(f"{uri} changed", found="another ETag") from error
        raise StoreError(
            f"S3 refuses {uri}",
            found=str(error),
            do="check AWS_ENDPOINT_URL, the credentials and the bucket's policy",
        ) from error
    except (BotoCoreError, Boto3Error) as error:
        raise StoreError(
            f"S3 cannot be reached for {uri}",
            found=str(error),
            do="check AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and that the server runs",
        ) from error
