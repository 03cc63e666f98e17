"""A real S3 server behind a faulty proxy: transient faults are retried, others are reported."""

import io
import time
from dataclasses import replace

import pytest

from tests.bases.uploads import model_of
from tests.faults.proxy import faulty
from tests.lifecycle.test_uploads import manifest_of, registered
from trans_peft.bases.cache import download
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.data import pin, read_examples
from trans_peft.domain.base import Manifest, Upload
from trans_peft.domain.data import DataSource
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.edges.s3_store import S3Store
from trans_peft.errors import AccessError, IntegrityError, StoreError
from trans_peft.lifecycle.adopt import adopt
from trans_peft.lifecycle.bases import ingest, pending

pytestmark = pytest.mark.servers

FILES = model_of()


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch):
    """boto3 waits a second and more between its attempts; the number of them stays."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)


@pytest.fixture(scope="module")
def stores(servers):
    """The server's own store, one that reaches it through the proxy, and the faults."""
    with faulty(servers.s3_url) as (url, faults), pytest.MonkeyPatch.context() as patch:
        direct = S3Store()
        direct.list(f"s3://{servers.bucket}/none")
        patch.setenv("AWS_ENDPOINT_URL", url)
        proxied = S3Store(chunk_bytes=64, timeout_s=0.5)
        proxied.list(f"s3://{servers.bucket}/none")
        yield direct, proxied, faults


@pytest.fixture
def place(servers, stores, unique, tmp_path):
    """A platform that reaches the server through the proxy, an upload there, and the faults."""
    direct, proxied, faults = stores
    prefix = f"s3://{servers.bucket}/{unique}/v1"
    for name, data in (FILES | {Manifest.FILE_NAME: manifest_of(FILES)}).items():
        direct.write(f"{prefix}/{name}", io.BytesIO(data))
    vars(faults).update(kind="", left=0, of="", wait_s=0.0, cut_at_bytes=0)
    faults.seen.clear()
    return replace(memory_platform(tmp_path / "work"), store=proxied), prefix, faults


def test_the_proxy_without_faults_changes_nothing(place):
    platform, prefix, _ = place
    assert ingest(Upload(prefix), platform).ready


MENDS = {
    "500": {"left": 3},
    "503": {"left": 3},
    "reset": {"left": 3},
    "wait": {"left": 2, "wait_s": 1.0},
    "truncate": {"left": 4, "cut_at_bytes": 100, "of": "model.safetensors"},
}


@pytest.mark.parametrize("kind", MENDS)
def test_transient_faults_are_retried(place, kind):
    platform, prefix, faults = place
    for name, value in ({"kind": kind} | MENDS[kind]).items():
        setattr(faults, name, value)
    assert ingest(Upload(prefix), platform).ready
    assert faults.left == 0


LASTS = {
    "500": "S3 failed for",
    "503": "S3 failed for",
    "reset": "S3 cannot be reached",
    "wait": "S3 cannot be reached",
    "truncate": "S3 cannot be reached",
    "403": "S3 denies access",
}


@pytest.mark.parametrize("of", ["model.safetensors", Manifest.FILE_NAME])
@pytest.mark.parametrize("kind", LASTS)
def test_lasting_faults_are_store_errors_and_refuse_nothing(place, kind, of):
    platform, prefix, faults = place
    faults.kind, faults.left, faults.of = kind, 1000, of
    faults.wait_s, faults.cut_at_bytes = 0.6, 0
    began = time.monotonic()
    with pytest.raises(StoreError, match=LASTS[kind]) as caught:
        ingest(Upload(prefix), platform)
    assert "do:" in str(caught.value)
    assert time.monotonic() - began < 30
    assert registered(platform) == {}
    faults.left = 0
    assert pending(platform, root_uri=prefix.removesuffix("/v1")) == (Upload(prefix),)
    assert ingest(Upload(prefix), platform).ready


@pytest.mark.parametrize("kind", LASTS)
def test_a_failed_listing_is_a_store_error(place, kind):
    platform, prefix, faults = place
    faults.kind, faults.left, faults.wait_s, faults.cut_at_bytes = kind, 1000, 0.6, 20
    with pytest.raises(StoreError):
        pending(platform, root_uri=prefix)


@pytest.mark.parametrize("kind", ["500", "reset", "truncate"])
def test_a_download_resumes_after_a_failure(place, kind, tmp_path):
    platform, prefix, faults = place
    wanted = fingerprint(prefix, platform.store)
    faults.kind, faults.left, faults.of, faults.cut_at_bytes = kind, 1000, "tokenizer.json", 0
    for _ in range(2):
        with pytest.raises(StoreError):
            download(prefix, platform.store, tmp_path, fingerprint=wanted, range_bytes=64)
    faults.left = 0
    faults.seen.clear()
    copy = download(prefix, platform.store, tmp_path, fingerprint=wanted, range_bytes=64)
    assert fingerprint(str(copy), FileStore()) == wanted
    ranges = sum(-(-len(data) // 64) for data in FILES.values())
    assert 0 < sum("list-type" not in path for path in faults.seen) < ranges


def test_a_server_without_ranges_is_detected(place, tmp_path):
    platform, prefix, faults = place
    wanted = fingerprint(prefix, platform.store)
    faults.kind, faults.left = "no ranges", 1000
    with pytest.raises(StoreError, match="a different range") as caught:
        download(prefix, platform.store, tmp_path, fingerprint=wanted, range_bytes=64)
    assert caught.match("Range header")


def test_an_object_that_changes_between_two_ranges_is_detected(place, stores, tmp_path):
    platform, prefix, _ = place
    wanted = fingerprint(prefix, platform.store)

    class Changing:
        list, left = platform.store.list, 5

        def read(self, uri, **how):
            self.left -= 1
            if self.left == 0:
                stores[0].write(f"{prefix}/model.safetensors", io.BytesIO(b"x" * 500))
            return platform.store.read(uri, **how)

    with pytest.raises(IntegrityError, match="changed"):
        download(prefix, Changing(), tmp_path, fingerprint=wanted, range_bytes=32)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", StoreError),
        ("AWS_ACCESS_KEY_ID", "nobody", AccessError),
        ("AWS_SECRET_ACCESS_KEY", "wrong", AccessError),
        ("AWS_SECRET_ACCESS_KEY", None, AccessError),
    ],
)
def test_denied_access_is_an_access_error_that_names_what_to_check(
    place, monkeypatch, name, value, error
):
    platform, prefix, _ = place
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    locked_out = replace(platform, store=S3Store(timeout_s=0.5))
    with pytest.raises(StoreError, match=r"check AWS_ENDPOINT_URL") as caught:
        ingest(Upload(prefix), locked_out)
    assert type(caught.value) is error
    assert "test-secret" not in str(caught.value)
    assert registered(platform) == {}


# Answers that are complete HTTP and not the object.

ROWS = b"".join(b'{"prompt": "%03d", "completion": "y"}\n' % i for i in range(100))


@pytest.mark.parametrize("kind", ["shorten", "alter"])
def test_rows_that_a_proxy_truncated_or_changed_are_never_pinned(place, stores, kind):
    platform, prefix, faults = place
    uri = f"{prefix}/rows.jsonl"
    stores[0].write(uri, io.BytesIO(ROWS))
    line = len(ROWS) // 100
    faults.kind, faults.left, faults.of, faults.cut_at_bytes = kind, 1000, "rows.jsonl", 51 * line
    with pytest.raises(StoreError, match=r"do: "):
        pin(DataSource(uri), platform.store)
    faults.left = 0
    assert len(read_examples(pin(DataSource(uri), platform.store), platform.store)) == 100


def read(store, uri, etag=None, **how):
    with store.read(uri, etag=etag, **how) as chunks:
        return b"".join(chunks)


@pytest.mark.parametrize("checksums", ["when_supported", "when_required"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_truncated_object_is_detected_with_and_without_checksums(
    servers, stores, unique, monkeypatch, checksums, parts
):
    """Of one part it has an MD5, of several its size alone; boto3 may send a checksum or not."""
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", checksums)
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", checksums)
    direct, proxied, faults = stores
    prefix = f"s3://{servers.bucket}/{unique}"
    data = bytes(range(256)) * (1 << 12) * (17 if parts == 2 else 1)
    S3Store().write(f"{prefix}/x", io.BytesIO(data))
    (listed,) = direct.list(prefix)
    assert listed.size == len(data)
    assert ("-" in listed.etag) == (parts == 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", str(proxied._client.meta.endpoint_url))
        store = S3Store(timeout_s=5)
        vars(faults).update(kind="shorten", left=1000, of="/x", cut_at_bytes=len(data) // 2)
        for etag in (None, listed.etag):
            with pytest.raises(StoreError):
                read(store, f"{prefix}/x", etag)
        faults.left = 0
        assert read(store, f"{prefix}/x", listed.etag) == data


@pytest.mark.parametrize("bounds", [{"start": 10}, {"stop": 90}, {"start": 10, "stop": 90}])
def test_a_truncated_range_is_detected(place, stores, bounds):
    platform, prefix, faults = place
    uri = f"{prefix}/rows.jsonl"
    stores[0].write(uri, io.BytesIO(ROWS))
    whole = ROWS[bounds.get("start", 0) : bounds.get("stop")]
    assert read(platform.store, uri, **bounds) == whole
    faults.kind, faults.left, faults.of, faults.cut_at_bytes = "shorten", 1000, "rows.jsonl", 7
    with pytest.raises(StoreError, match="a different range"):
        read(platform.store, uri, **bounds)


@pytest.mark.parametrize("of", FILES)
def test_a_truncated_upload_is_neither_ready_nor_refused(place, of):
    platform, prefix, faults = place
    faults.kind, faults.left, faults.of, faults.cut_at_bytes = "shorten", 1000, of, 20
    with pytest.raises(StoreError):
        ingest(Upload(prefix), platform)
    faults.left = 0
    assert pending(platform, root_uri=prefix.removesuffix("/v1")) == (Upload(prefix),)
    assert ingest(Upload(prefix), platform).ready


@pytest.mark.parametrize("kind", ["shorten", "alter"])
def test_a_download_never_keeps_truncated_or_changed_content(place, kind, tmp_path):
    platform, prefix, faults = place
    wanted = fingerprint(prefix, platform.store)
    faults.kind, faults.left, faults.of, faults.cut_at_bytes = kind, 1000, "tokenizer.json", 20
    with pytest.raises((StoreError, IntegrityError)):
        download(prefix, platform.store, tmp_path, fingerprint=wanted, range_bytes=64)
    faults.left = 0
    copy = download(prefix, platform.store, tmp_path, fingerprint=wanted, range_bytes=64)
    assert fingerprint(str(copy), FileStore()) == wanted


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_truncated_adapter_is_not_adopted(place, stores, name):
    platform, prefix, faults = place
    ingest(Upload(prefix), platform)
    uri = f"{prefix.removesuffix('/v1')}/adapter"
    config = b'{"peft_type": "LORA", "target_modules": ["q_proj"], "revision": "v1"}'
    for file, data in (("adapter_config.json", config), ("adapter_model.safetensors", ROWS)):
        stores[0].write(f"{uri}/{file}", io.BytesIO(data))
    faults.kind, faults.left, faults.of, faults.cut_at_bytes = "shorten", 1000, name, 20
    with pytest.raises(StoreError):
        adopt("a", uri, "smol", (), platform)
