"""Uploads of common S3 clients to an S3 server."""

import io
from dataclasses import replace

import pytest

from tests.bases.uploads import model_of
from tests.lifecycle.test_uploads import manifest_of, registered
from trans_peft.domain.base import Manifest
from trans_peft.edges.memory import memory_platform
from trans_peft.edges.stores import SchemeStore
from trans_peft.errors import IntegrityError, UploadError
from trans_peft.lifecycle.bases import ingest, pending

pytestmark = pytest.mark.servers

BIG = {"README.md": b"0123456789abcdef" * (6 << 16)}  # 6 MiB: two parts
FILES = model_of() | BIG
WHOLE = FILES | {Manifest.FILE_NAME: manifest_of(FILES)}


@pytest.fixture(scope="module")
def s3(servers):
    import boto3
    from botocore.config import Config

    silent = Config(request_checksum_calculation="when_required")
    session = boto3.Session()
    return {
        "boto3": session.client("s3"),
        "without checksums": session.client("s3", config=silent),
    }


@pytest.fixture(scope="module")
def store(servers):
    return SchemeStore()


@pytest.fixture
def platform(store, tmp_path):
    return replace(memory_platform(tmp_path), store=store)


def in_parts(client, bucket, key, data):
    """Upload a large file in parts in any order, as `aws s3 cp` and rclone do."""
    size = 5 << 20
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    where = {"Bucket": bucket, "Key": key, "UploadId": upload}
    parts = [
        {
            "PartNumber": number,
            "ETag": client.upload_part(
                **where, PartNumber=number, Body=data[(number - 1) * size : number * size]
            )["ETag"],
        }
        for number in reversed(range(1, len(data) // size + 2))
    ]
    return where, {"Parts": parts[::-1]}


def by_parts(s3, bucket, key, data):
    client = s3["boto3"]
    where, parts = in_parts(client, bucket, key, data)
    client.complete_multipart_upload(**where, MultipartUpload=parts)


def by_upload_file(s3, bucket, key, data):
    from boto3.s3.transfer import TransferConfig

    config = TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20)
    s3["boto3"].upload_fileobj(io.BytesIO(data), bucket, key, Config=config)


CLIENTS = {
    "put_object": lambda s3, bucket, key, data: s3["boto3"].put_object(
        Bucket=bucket, Key=key, Body=data
    ),
    "put_object without checksums": lambda s3, bucket, key, data: s3[
        "without checksums"
    ].put_object(Bucket=bucket, Key=key, Body=data),
    "put_object with SHA256": lambda s3, bucket, key, data: s3["boto3"].put_object(
        Bucket=bucket, Key=key, Body=data, ChecksumAlgorithm="SHA256"
    ),
    "upload_fileobj": by_upload_file,
    "parts in any order": by_parts,
}


@pytest.mark.parametrize("order", [list, lambda names: list(names)[::-1]], ids=["last", "first"])
@pytest.mark.parametrize("client", CLIENTS)
def test_any_client_and_upload_order_give_the_same_base(
    platform, s3, servers, unique, client, order
):
    seen = set()
    for name in order(WHOLE):
        CLIENTS[client](s3, servers.bucket, f"{unique}/v1/{name}", WHOLE[name])
        seen |= set(pending(platform, root_uri=f"s3://{servers.bucket}/{unique}"))
    assert len(seen) == 1
    (base,) = (ingest(upload, platform) for upload in seen)
    assert (base.family, base.version, base.ready) == ("smol", "v1", True)
    assert base.uri == f"s3://{servers.bucket}/{unique}/v1"
    assert pending(platform, root_uri=f"s3://{servers.bucket}/{unique}") == ()


def test_an_incomplete_multipart_upload_is_not_a_file(platform, s3, servers, unique):
    for name in WHOLE.keys() - BIG:
        CLIENTS["put_object"](s3, servers.bucket, f"{unique}/v1/{name}", WHOLE[name])
    where, parts = in_parts(s3["boto3"], servers.bucket, f"{unique}/v1/README.md", BIG["README.md"])
    root = f"s3://{servers.bucket}/{unique}"
    (upload,) = pending(platform, root_uri=root)
    with pytest.raises(UploadError, match=r"is not complete:\n  - README\.md: missing"):
        ingest(upload, platform)
    assert pending(platform, root_uri=root) == ()
    s3["boto3"].complete_multipart_upload(**where, MultipartUpload=parts)
    assert ingest(*pending(platform, root_uri=root), platform).ready


def test_an_object_that_is_replaced_during_the_read_is_an_error(platform, s3, servers, unique):
    for name, data in WHOLE.items():
        CLIENTS["put_object"](s3, servers.bucket, f"{unique}/v1/{name}", data)
    root, real = f"s3://{servers.bucket}/{unique}", platform.store
    (upload,) = pending(platform, root_uri=root)

    class Changing:
        list = real.list

        def read(self, uri, **how):
            if uri.endswith("tokenizer.json"):
                for name in ("tokenizer.json", "config.json"):
                    CLIENTS["put_object"](s3, servers.bucket, f"{unique}/v1/{name}", b"other")
            return real.read(uri, **how)

    with pytest.raises(IntegrityError, match=r"a new version of tokenizer\.json"):
        ingest(upload, replace(platform, store=Changing()))
    assert registered(platform) == {}
    for name in ("tokenizer.json", "config.json"):
        CLIENTS["put_object"](s3, servers.bucket, f"{unique}/v1/{name}", WHOLE[name])
    assert ingest(*pending(platform, root_uri=root), platform).ready


@pytest.mark.parametrize("prefix", ["with space/v 1", "ünï cödé/漢字", "100%25/%2e%2e", "a+b&c=d"])
def test_any_prefix_name_is_accepted(platform, s3, servers, unique, prefix):
    for name, data in WHOLE.items():
        CLIENTS["put_object"](s3, servers.bucket, f"{unique}/{prefix}/{name}", data)
    (upload,) = pending(platform, root_uri=f"s3://{servers.bucket}/{unique}")
    assert ingest(upload, platform).uri == f"s3://{servers.bucket}/{unique}/{prefix}"
