"""Objects in S3, or in anything that speaks its protocol, as an `ArtifactStore`.

The one place that imports boto3. Credentials, region and endpoint come from where every AWS client
takes them (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, profiles, roles). A read is bound to the ETag
that was seen (`If-Match`), so what is verified and what is used are the same bytes. What is read
whole is compared with the object's MD5 where the ETag is one, else with its listed size; boto3
compares checksums (`x-amz-checksum-*`) where objects have one.
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
from trans_peft.errors import AccessError, IntegrityError, NotFoundError, StoreError
from trans_peft.ports import StoredFile

__all__ = ["S3Store"]

_TRANSFER = TransferConfig(multipart_threshold=16 << 20, multipart_chunksize=16 << 20)
_MOST_BREAKS = 5  # of one stream, in mid-flow
_MOST_CONNECTIONS = 32
_MD5 = re.compile(r'"?[0-9a-f]{32}"?')
_MISSING = frozenset({"404", "NoSuchBucket", "NoSuchKey", "NotFound"})
_CHANGED = frozenset({"412", "416", "InvalidRange", "PreconditionFailed"})
_NOT_LET_IN = frozenset({
    "401", "403", "AccessDenied", "AllAccessDisabled", "ExpiredToken", "ExpiredTokenException",
    "InvalidAccessKeyId", "InvalidToken", "RequestTimeTooSkewed", "SignatureDoesNotMatch",
    "TokenRefreshRequired",
})  # fmt: skip


class S3Store:
    """`ArtifactStore` in S3; reads in chunks of `chunk_bytes`. Safe to share between threads.

    A server that says nothing for `timeout_s` is asked again, four times in all.
    """

    def __init__(self, *, chunk_bytes: int = 1 << 20, timeout_s: float = 60) -> None:
        self.places = Places()
        self._chunk_bytes = chunk_bytes
        self._config = Config(
            connect_timeout=min(5, timeout_s),
            read_timeout=timeout_s,
            retries={"mode": "standard", "total_max_attempts": 4},
            max_pool_connections=_MOST_CONNECTIONS,
            user_agent_extra="trans-peft",
        )

    @cached_property
    def _client(self) -> Any:
        return boto3.Session().client("s3", config=self._config)

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

    def read(
        self, uri: str, *, etag: str | None = None, start: int = 0, stop: int | None = None
    ) -> AbstractContextManager[Iterator[bytes]]:
        """Stream the bytes [start, stop) of one object in chunks.

        NotFoundError; IntegrityError if its ETag is another; StoreError, at the latest after the
        last chunk, if the answer is not what the store lists.
        """
        return self._read(uri, etag, start, stop)

    @contextmanager
    def _read(
        self, uri: str, etag: str | None, start: int, stop: int | None
    ) -> Iterator[Iterator[bytes]]:
        with _in_words(uri):
            found = self._get(uri, etag, start, stop)
        chunks = self._chunks(uri, found, start, stop)
        try:
            yield chunks
        finally:
            chunks.close()

    def _get(self, uri: str, etag: str | None, start: int, stop: int | None) -> Any:
        """Return the answer for the bytes [start, stop), which must be of this ETag and extent."""
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
                f"S3 answers with other bytes of {uri} than those asked for",
                expected=request["Range"],
                found=f"{found.get('ContentRange') or 'the whole object'},"
                f" {found['ContentLength']} bytes",
                do="look for a proxy in between that leaves out the Range header",
            )
        return found

    def _chunks(
        self, uri: str, found: Any, start: int, stop: int | None
    ) -> Generator[bytes, None, None]:
        """Read on where the connection broke off, but only from the same object.

        A whole object is compared with its checksum, or with its size, before the last read ends.
        """
        etag, body, position, breaks = found["ETag"], found["Body"], start, 0
        end = start + found["ContentLength"]
        whole = not start and stop is None
        md5 = hashlib.md5(usedforsecurity=False) if whole and _is_md5(uri, found) else None
        try:
            with _in_words(uri):
                while True:
                    try:
                        for chunk in body.iter_chunks(self._chunk_bytes):
                            position += len(chunk)
                            if md5 is not None:
                                md5.update(chunk)
                            yield chunk
                        break
                    except FlexibleChecksumError:  # what was given out already is not its content
                        raise
                    except BotoCoreError:
                        breaks += 1
                        if breaks > _MOST_BREAKS or position >= end:
                            raise
                        body.close()
                        body = self._get(uri, etag, position, stop)["Body"]
                if md5 is not None and md5.hexdigest() != etag.strip('"'):
                    raise _other_bytes(uri, f"MD5 {etag}", f"MD5 {md5.hexdigest()}", position)
                if position != end or (whole and md5 is None):
                    size = self._size(uri, etag) if whole else end
                    if position != size:
                        raise _other_bytes(
                            uri, f"{size - start} bytes", "too few", position - start
                        )
        finally:
            body.close()

    def _size(self, uri: str, etag: str) -> int:
        """Return the size of this version of an object as its store lists it."""
        bucket, key = _bucket_and_key(uri)
        found = self._client.head_object(Bucket=bucket, Key=key, IfMatch=etag)
        return found["ContentLength"]

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


def _is_range(found: Any, start: int, stop: int | None) -> bool:
    """Whether an answer holds [start, stop) of its object, or as much of that as there is."""
    told = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", found.get("ContentRange") or "")
    if told is None:
        return False
    first, last, total = map(int, told.groups())
    end = total if stop is None else min(stop, total)
    return (first, last + 1, found["ContentLength"]) == (start, end, end - start)


def _is_md5(uri: str, found: Any) -> bool:
    """Whether an object's ETag is the MD5 of its bytes.

    It is for objects of one part, unless they are encrypted with keys from KMS or of the customer,
    or lie in a directory bucket (Amazon S3 API reference, "Object").
    """
    encrypted = found.get("SSECustomerAlgorithm") or "kms" in found.get("ServerSideEncryption", "")
    directory = _bucket_and_key(uri)[0].endswith("--x-s3")
    return bool(_MD5.fullmatch(found["ETag"])) and not encrypted and not directory


def _other_bytes(uri: str, expected: str, found: str, size: int) -> StoreError:
    return StoreError(
        f"S3 gave other bytes of {uri} than the object has",
        expected=expected,
        found=f"{found}, in {size} bytes",
        do="try again; look for a proxy or cache in between that shortens or changes answers",
    )


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
        if code in _NOT_LET_IN:
            raise _not_let_in(uri, error) from error
        raise StoreError(
            f"S3 failed at {uri}", found=str(error), do="try again; look at the server's log"
        ) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise _not_let_in(uri, error) from error
    except (BotoCoreError, Boto3Error) as error:
        raise StoreError(
            f"S3 cannot be reached for {uri}",
            found=str(error),
            do="check AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and that the server runs",
        ) from error


def _not_let_in(uri: str, error: Exception) -> AccessError:
    return AccessError(
        f"S3 does not let us in to {uri}",
        found=str(error),
        do="check AWS_ENDPOINT_URL, the credentials (wrong or expired?), the bucket's policy and "
        "this machine's clock",
    )
