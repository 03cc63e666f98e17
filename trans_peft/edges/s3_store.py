"""Objects in S3, or in a server with the same protocol, as an `ArtifactStore`.

No other module of the library imports boto3. Credentials, region and endpoint come from boto3's
default sources (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, profiles, roles). A read requests the ETag
that was listed (`If-Match`), so that the bytes that are verified are the bytes that are used. The
content of a whole object is compared with its MD5 if the ETag is one, else with its listed size;
boto3 verifies `x-amz-checksum-*` for objects that have such a checksum.
"""

import builtins
import hashlib
import re
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any, BinaryIO

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    NoCredentialsError,
    PartialCredentialsError,
)

from trans_peft.domain.places import Places
from trans_peft.errors import (
    AccessError,
    IntegrityError,
    NotFoundError,
    StoreError,
    TransPeftError,
    map_exceptions,
)
from trans_peft.ports import StoredFile

__all__ = ["S3Store"]

_TRANSFER = TransferConfig(multipart_threshold=16 << 20, multipart_chunksize=16 << 20)
_MAX_RESUMES = 5  # after broken connections, for each stream
_MAX_CONNECTIONS = 32
_MD5 = re.compile(r'"?[0-9a-f]{32}"?')
_MISSING = frozenset({"404", "NoSuchBucket", "NoSuchKey", "NotFound"})
_CHANGED = frozenset({"412", "416", "InvalidRange", "PreconditionFailed"})
_DENIED = frozenset({
    "401", "403", "AccessDenied", "AllAccessDisabled", "ExpiredToken", "ExpiredTokenException",
    "InvalidAccessKeyId", "InvalidToken", "RequestTimeTooSkewed", "SignatureDoesNotMatch",
    "TokenRefreshRequired",
})  # fmt: skip


class S3Store:
    """`ArtifactStore` in S3; reads in chunks of `chunk_bytes`. Safe to share between threads.

    A request that gets no response within `timeout_s` is sent again, up to four times in all.
    """

    def __init__(self, *, chunk_bytes: int = 1 << 20, timeout_s: float = 60) -> None:
        self.places = Places()
        self._chunk_bytes = chunk_bytes
        self._config = Config(
            connect_timeout=min(5, timeout_s),
            read_timeout=timeout_s,
            retries={"mode": "standard", "total_max_attempts": 4},
            max_pool_connections=_MAX_CONNECTIONS,
            user_agent_extra="trans-peft",
        )

    @cached_property
    def _client(self) -> Any:
        return boto3.Session().client("s3", config=self._config)

    def list(self, prefix_uri: str) -> tuple[StoredFile, ...]:
        """Return all objects below a prefix, sorted by name, without folder markers."""
        bucket, prefix = _bucket_and_key(prefix_uri)
        prefix = f"{prefix.rstrip('/')}/" if prefix else ""
        found: builtins.list[StoredFile] = []
        with _mapped_errors(prefix_uri):
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

    def read(
        self, uri: str, *, etag: str | None = None, start: int = 0, stop: int | None = None
    ) -> AbstractContextManager[Iterator[bytes]]:
        """Stream the bytes [start, stop) of one object in chunks.

        Raises NotFoundError, IntegrityError if the ETag differs, and StoreError, at the latest
        after the last chunk, if the bytes do not match the listed size or the checksum.
        """
        return self._read(uri, etag, start, stop)

    @contextmanager
    def _read(
        self, uri: str, etag: str | None, start: int, stop: int | None
    ) -> Iterator[Iterator[bytes]]:
        with _mapped_errors(uri):
            found = self._get(uri, etag, start, stop)
        chunks = self._chunks(uri, found, start, stop)
        try:
            yield chunks
        finally:
            chunks.close()

    def _get(self, uri: str, etag: str | None, start: int, stop: int | None) -> Any:
        """Return the response for the bytes [start, stop), with its ETag and range verified."""
        bucket, key = _bucket_and_key(uri)
        request = {"IfMatch": etag} if etag else {}
        if start or stop is not None:
            request["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        found = self._client.get_object(Bucket=bucket, Key=key, **request)
        if etag and found["ETag"] != etag:
            found["Body"].close()
            raise IntegrityError(f"{uri} changed", expected=f"ETag {etag}", found=found["ETag"])
        if "Range" in request and not _is_range(found, start, stop):
            found["Body"].close()
            raise StoreError(
                f"S3 returned a different range of {uri} than requested",
                expected=request["Range"],
                found=f"{found.get('ContentRange') or 'the whole object'},"
                f" {found['ContentLength']} bytes",
                do="check for a proxy that removes the Range header",
            )
        return found

    def _chunks(
        self, uri: str, found: Any, start: int, stop: int | None
    ) -> Generator[bytes, None, None]:
        """Yield the bytes; resume after a broken connection, from the same version of the object.

        A whole object is compared with its checksum, or with its size, before the iterator ends.
        """
        etag, body, position, resumes = found["ETag"], found["Body"], start, 0
        end = start + found["ContentLength"]
        whole = not start and stop is None
        md5 = hashlib.md5(usedforsecurity=False) if whole and _is_md5(uri, found) else None
        try:
            with _mapped_errors(uri):
                while True:
                    try:
                        for chunk in body.iter_chunks(self._chunk_bytes):
                            position += len(chunk)
                            if md5 is not None:
                                md5.update(chunk)
                            yield chunk
                        break
                    except FlexibleChecksumError:  # the bytes read so far are wrong: do not resume
                        raise
                    except BotoCoreError:
                        resumes += 1
                        if resumes > _MAX_RESUMES or position >= end:
                            raise
                        body.close()
                        body = self._get(uri, etag, position, stop)["Body"]
                if md5 is not None and md5.hexdigest() != etag.strip('"'):
                    raise _wrong_content(uri, f"MD5 {etag}", f"MD5 {md5.hexdigest()}", position)
                if position != end or (whole and md5 is None):
                    size = self._size(uri, etag) if whole else end
                    if position != size:
                        raise _wrong_content(
                            uri, f"{size - start} bytes", "too few", position - start
                        )
        finally:
            body.close()

    def _size(self, uri: str, etag: str) -> int:
        """Return the size in bytes of this version of an object, from a HEAD request."""
        bucket, key = _bucket_and_key(uri)
        found = self._client.head_object(Bucket=bucket, Key=key, IfMatch=etag)
        return found["ContentLength"]

    def write(self, uri: str, data: BinaryIO) -> None:
        """Write one object atomically, as a multipart upload if it is large. Raises StoreError."""
        bucket, key = _bucket_and_key(uri)
        with _mapped_errors(uri):
            self._client.upload_fileobj(_Unclosed(data), bucket, key, Config=_TRANSFER)

    def remove(self, uri: str) -> None:
        """Remove one object. Does nothing if there is none. Raises StoreError."""
        bucket, key = _bucket_and_key(uri)
        with _mapped_errors(uri):
            self._client.delete_object(Bucket=bucket, Key=key)


class _Unclosed:
    """A file without `close`: boto3 closes the files that it uploads, the caller's stays open."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)


def _is_range(found: Any, start: int, stop: int | None) -> bool:
    """Whether a response holds [start, stop) of its object, or all of it up to the end."""
    content_range = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", found.get("ContentRange") or "")
    if content_range is None:
        return False
    first, last, total = map(int, content_range.groups())
    end = total if stop is None else min(stop, total)
    return (first, last + 1, found["ContentLength"]) == (start, end, end - start)


def _is_md5(uri: str, found: Any) -> bool:
    """Whether an object's ETag is the MD5 of its bytes.

    True for objects of one part, unless they are encrypted with KMS or customer keys or are in a
    directory bucket (Amazon S3 API reference, "Object").
    """
    encrypted = found.get("SSECustomerAlgorithm") or "kms" in found.get("ServerSideEncryption", "")
    directory = _bucket_and_key(uri)[0].endswith("--x-s3")
    return bool(_MD5.fullmatch(found["ETag"])) and not encrypted and not directory


def _wrong_content(uri: str, expected: str, found: str, size: int) -> StoreError:
    return StoreError(
        f"the content that S3 returned for {uri} is wrong",
        expected=expected,
        found=f"{found}, in {size} bytes",
        do="try again; check for a proxy or cache that truncates or changes responses",
    )


def _bucket_and_key(uri: str) -> tuple[str, str]:
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise StoreError("not an S3 URI", expected="s3://bucket/key", found=uri)
    return bucket, key


def _mapped_errors(uri: str) -> AbstractContextManager[None]:
    """Translate errors of S3 and of boto3."""
    return map_exceptions(
        {
            ClientError: lambda error: _response_error(uri, error),
            NoCredentialsError: lambda error: _denied(uri, error),
            PartialCredentialsError: lambda error: _denied(uri, error),
            BotoCoreError: lambda error: _unreachable(uri, error),
            Boto3Error: lambda error: _unreachable(uri, error),
        }
    )


def _response_error(uri: str, error: ClientError) -> TransPeftError:
    code = error.response.get("Error", {}).get("Code", "")
    if code in _MISSING:
        return NotFoundError(f"there is no {uri}", found=code)
    if code in _CHANGED:
        return IntegrityError(f"{uri} changed", found="a different ETag")
    if code in _DENIED:
        return _denied(uri, error)
    return StoreError(
        f"S3 failed for {uri}", found=str(error), do="try again; check the log of the S3 server"
    )


def _unreachable(uri: str, error: Exception) -> StoreError:
    return StoreError(
        f"S3 cannot be reached for {uri}",
        found=str(error),
        do="check AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and that the server runs",
    )


def _denied(uri: str, error: Exception) -> AccessError:
    return AccessError(
        f"S3 denies access to {uri}",
        found=str(error),
        do="check AWS_ENDPOINT_URL, the credentials (wrong or expired), the policy of the bucket "
        "and the clock of this machine",
    )
