"""The S3 server is killed (-9) in the middle of ingestions and downloads, and started again.

A few times in every run, five seconds each; twenty with KILLS=20.
"""

import io
import os
import signal
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import pytest

from tests.bases.uploads import model_of
from tests.lifecycle.test_uploads import manifest_of, registered
from tests.servers import (
    Servers,
    _environment,
    _free_ports,
    _make_buckets,
    _running,
    _s3_command,
    _wait,
)
from trans_peft.bases.cache import download
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.domain.base import Manifest
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.edges.s3_store import S3Store
from trans_peft.errors import NotFoundError, StoreError, UploadError
from trans_peft.lifecycle.bases import ingest, pending

pytestmark = pytest.mark.servers

FILES = model_of() | {"README.md": bytes(range(256)) * (1 << 14)}  # 4 MiB
PREFIX = "s3://bases/smol/v1"
KILLS = int(os.environ.get("KILLS", "3"))


class Mortal:
    """An S3 server of this test's own."""

    def __init__(self, folder):
        s3_port, *self.inner = _free_ports(8)
        self.found = Servers("", f"http://127.0.0.1:{s3_port}", "test-access", "test-secret")
        self.folder, self.stack = folder, ExitStack()

    def start(self):
        command = self.command
        self.server = self.stack.enter_context(_running(command, self.folder))
        _wait(self.server, f"{self.found.s3_url}/healthz")

    @property
    def command(self):
        if not self.folder.exists():
            self.kept = _s3_command(self.folder, self.found, self.inner)
        return self.kept

    def kill(self):
        os.killpg(self.server.process.pid, signal.SIGKILL)
        self.server.process.wait()


@contextmanager
def mortal(folder):
    server = Mortal(folder)
    with _environment(server.found.environment):
        server.start()
        _make_buckets(server.server)
        try:
            yield server
        finally:
            server.kill()
            for port in server.inner:  # SeaweedFS leaves these when it is killed
                for path in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"):
                    path.unlink(missing_ok=True)


def until_it_answers(call):
    """Retry a StoreError for 60 s, as the task does. Return the result and the number of errors."""
    deadline, errors = time.monotonic() + 60, 0
    while True:
        try:
            return call(), errors
        except StoreError:
            errors += 1
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_at_random_moments_do_not_change_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.1)
    draw, errors = Random(0), 0
    with mortal(tmp_path / "s3") as server:
        store = S3Store(chunk_bytes=1 << 14, timeout_s=5)
        for name, data in (FILES | {Manifest.FILE_NAME: manifest_of(FILES)}).items():
            store.write(f"{PREFIX}/{name}", io.BytesIO(data))
        wanted = fingerprint(PREFIX, store)
        for kill in range(KILLS):
            platform = replace(memory_platform(tmp_path / f"{kill}"), store=Slow(store))
            reaper = threading.Thread(target=die_and_rise, args=(server, draw.uniform(0, 0.5)))
            reaper.start()
            found, failed = until_it_answers(partial(reconciled, platform))
            copy, failed_too = until_it_answers(partial(copied, platform, wanted))
            reaper.join()
            errors += failed + failed_too
            assert [base.version for base in found["smol"]] == ["v1"]
            assert found["smol"][0].fingerprint_sha256 == wanted.digest
            assert fingerprint(str(copy), FileStore()) == wanted
    assert errors > 0  # at least one call met a stopped server


def die_and_rise(server, delay_s):
    time.sleep(delay_s)
    server.kill()
    server.start()


def copied(platform, wanted):
    cache_dir = platform.work_dir / "bases"
    return download(PREFIX, platform.store, cache_dir, fingerprint=wanted, range_bytes=64)


class Slow:
    """A store that reads slowly, so that a kill interrupts a read."""

    def __init__(self, store):
        self.store, self.list = store, store.list

    @contextmanager
    def read(self, uri, **how):
        with self.store.read(uri, **how) as chunks:
            yield (time.sleep(0.002) or chunk for chunk in chunks)


def reconciled(platform):
    for upload in pending(platform, root_uri="s3://bases"):
        try:
            ingest(upload, platform)
        except (UploadError, NotFoundError) as refusal:
            pytest.fail(f"a dying server was taken for a bad upload: {refusal}")
    found = registered(platform)
    if "smol" not in found:
        raise StoreError("the listing was empty: the server is not all there yet")
    return found
