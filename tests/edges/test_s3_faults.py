"""A real S3 server behind a bad network: what may mend is tried again, the rest is told."""

import io
import time
from dataclasses import replace

import pytest

from tests.bases.uploads import model_of
from tests.faults.proxy import faulty
from tests.lifecycle.test_uploads import manifest_of, registered
from trans_peft.bases.cache import download
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.domain.base import Manifest, Upload
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.edges.s3_store import S3Store
from trans_peft.errors import AccessError, IntegrityError, StoreError
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


def test_untouched_it_is_the_server_itself(place):
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
def test_what_mends_by_itself_is_not_noticed(place, kind):
    platform, prefix, faults = place
    for name, value in ({"kind": kind} | MENDS[kind]).items():
        setattr(faults, name, value)
    assert ingest(Upload(prefix), platform).ready
    assert faults.left == 0


LASTS = {
    "500": "S3 failed at",
    "503": "S3 failed at",
    "reset": "S3 cannot be reached",
    "wait": "S3 cannot be reached",
    "truncate": "S3 cannot be reached",
    "403": "S3 does not let us in",
}


@pytest.mark.parametrize("of", ["model.safetensors", Manifest.FILE_NAME])
@pytest.mark.parametrize("kind", LASTS)
def test_what_lasts_is_said_and_nothing_is_half_or_refused(place, kind, of):
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
def test_a_listing_that_cannot_be_had_is_said(place, kind):
    platform, prefix, faults = place
    faults.kind, faults.left, faults.wait_s, faults.cut_at_bytes = kind, 1000, 0.6, 20
    with pytest.raises(StoreError):
        pending(platform, root_uri=prefix)


@pytest.mark.parametrize("kind", ["500", "reset", "truncate"])
def test_a_download_goes_on_where_a_failure_left_it(place, kind, tmp_path):
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


def test_a_server_that_knows_no_ranges_is_found_out(place, tmp_path):
    platform, prefix, faults = place
    wanted = fingerprint(prefix, platform.store)
    faults.kind, faults.left = "no ranges", 1000
    with pytest.raises(StoreError, match="answers with other bytes") as caught:
        download(prefix, platform.store, tmp_path, fingerprint=wanted, range_bytes=64)
    assert caught.match("Range header")


def test_an_object_that_changes_between_two_ranges_is_noticed(place, stores, tmp_path):
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
def test_who_is_not_let_in_is_told_what_to_check(place, monkeypatch, name, value, error):
    platform, prefix, _ = place
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    locked_out = replace(platform, store=S3Store(timeout_s=0.5))
    with pytest.raises(StoreError, match=r"check AWS_ENDPOINT_URL") as caught:
        ingest(Upload(prefix), locked_out)
    assert type(caught.value) is error
    assert "test-secret" not in str(caught.value)
    assert registered(platform) == {}
