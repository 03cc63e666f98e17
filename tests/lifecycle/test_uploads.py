"""The registry after uploads in any order, in parts, twice, or rewritten."""

import errno
import hashlib
import io
import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.bases.uploads import model_of, model_weights
from trans_peft.domain.base import Manifest, Upload
from trans_peft.edges.memory import MemoryStore, memory_platform
from trans_peft.errors import (
    IntegrityError,
    InvalidSpecError,
    NotFoundError,
    StoreError,
    UploadError,
)
from trans_peft.lifecycle.bases import ingest, pending

ROOT = "s3://bases"
PREFIX = f"{ROOT}/smol/v1"
FILES = model_of()


def manifest_of(files, **changes):
    stated = [
        {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    ]
    whole = {"format": Manifest.FORMAT, "family": "smol", "version": "v1", "parent": None}
    return json.dumps(whole | {"files": stated} | changes).encode()


WHOLE = FILES | {Manifest.FILE_NAME: manifest_of(FILES)}


def put(platform, files, prefix=PREFIX):
    for name, data in files.items():
        platform.store.write(f"{prefix}/{name}", io.BytesIO(data))


def reconcile(platform):
    """Ingest all pending uploads as the flow does; return the error messages."""
    messages = []
    for upload in pending(platform, root_uri=ROOT):
        try:
            ingest(upload, platform)
        except (UploadError, NotFoundError, IntegrityError, StoreError) as error:
            messages.append(str(error))
    return messages


def registered(platform):
    catalog = platform.catalog
    return {name: catalog.versions(name) for name in catalog.families()}


@pytest.fixture
def platform(tmp_path):
    return memory_platform(tmp_path)


def undisturbed(tmp_path):
    platform = memory_platform(tmp_path)
    put(platform, WHOLE)
    assert reconcile(platform) == []
    return registered(platform)


class Interleaved(MemoryStore):
    """A store in which another put happens after a given number of reads and listings."""

    def __init__(self, puts, gaps):
        super().__init__(chunk_bytes=64)
        self.puts, self.gaps, self.left = list(puts), list(gaps), 0

    def tick(self):
        self.left -= 1
        if self.left < 0 and self.puts:
            name, data = self.puts.pop(0)
            self.write(f"{PREFIX}/{name}", io.BytesIO(data))
            self.left = self.gaps.pop(0) if self.gaps else 0

    def list(self, prefix_uri):
        self.tick()
        return super().list(prefix_uri)

    @contextmanager
    def read(self, uri, **how):
        with super().read(uri, **how) as chunks:
            yield self._ticking(chunks)

    def _ticking(self, chunks):
        for chunk in chunks:
            self.tick()
            yield chunk


@st.composite
def histories(draw):
    """Puts in any order, with wrong, partial and empty contents first, and repeated files."""
    false = st.sampled_from([b"", b"half of i", b"{}"])
    earlier = draw(st.lists(st.tuples(st.sampled_from(sorted(WHOLE)), false), max_size=4))
    final = draw(st.permutations(list(WHOLE.items())))
    twice = draw(st.lists(st.sampled_from(sorted(WHOLE.items())), max_size=2))
    puts = [*earlier, *final, *twice]
    gaps = draw(st.lists(st.integers(0, 40), min_size=len(puts), max_size=len(puts)))
    return puts, gaps


@given(histories())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_order_of_puts_and_reconciles_reaches_the_same_state(tmp_path_factory, history):
    folder = tmp_path_factory.mktemp("uploads")
    store = Interleaved(*history)
    platform = replace(memory_platform(folder / "work"), store=store)
    while store.puts:
        reconcile(platform)
        store.tick()
    reconcile(platform)
    assert registered(platform) == undisturbed(folder / "undisturbed")
    assert pending(platform, root_uri=ROOT) == ()


@given(st.permutations(list(WHOLE.items())), st.data())
@settings(max_examples=40, deadline=None)
def test_a_reconcile_between_any_two_puts_changes_nothing(tmp_path_factory, puts, data):
    folder = tmp_path_factory.mktemp("uploads")
    platform = memory_platform(folder / "work")
    for name, content in puts:
        put(platform, {name: content})
        if data.draw(st.booleans()):
            reconcile(platform)
    reconcile(platform)
    assert registered(platform) == undisturbed(folder / "undisturbed")


# The table of docs/uploads.md.


def test_without_a_manifest_nothing_happens(platform):
    put(platform, FILES)
    assert (reconcile(platform), registered(platform)) == ([], {})


def test_a_manifest_before_its_files_reports_what_is_missing(platform):
    put(platform, {n: d for n, d in WHOLE.items() if n != "tokenizer.json"})
    (message,) = reconcile(platform)
    assert "is not complete" in message
    assert "tokenizer.json: missing" in message
    assert reconcile(platform) == []  # reported once
    put(platform, {"tokenizer.json": WHOLE["tokenizer.json"]})
    assert reconcile(platform) == []
    assert [base.version for base in registered(platform)["smol"]] == ["v1"]


def test_a_file_that_changed_and_changed_back_during_the_read_is_pending_again(platform):
    put(platform, WHOLE)
    store, name = platform.store, "tokenizer.json"

    class Restless(MemoryStore):
        def __init__(self):
            super().__init__()
            self._files = store._files

        @contextmanager
        def read(self, uri, **how):
            if uri.endswith(name):
                self.write(uri, io.BytesIO(b"other"))
            try:
                with super().read(uri, **how) as chunks:
                    yield chunks
            finally:
                if uri.endswith(name):
                    self.write(uri, io.BytesIO(WHOLE[name]))

    (message,) = reconcile(replace(platform, store=Restless()))
    assert "changed while it was being read" in message
    assert reconcile(platform) == []
    assert [base.version for base in registered(platform)["smol"]] == ["v1"]


def test_an_upload_corrected_during_its_refusal_is_pending_again(platform):
    put(platform, WHOLE | {"tokenizer.json": FILES["tokenizer.json"][:-1] + b" "})
    store = platform.store

    class Mending(MemoryStore):
        def __init__(self):
            super().__init__()
            self._files = store._files
            self.listings = 0

        def list(self, prefix_uri):
            found = super().list(prefix_uri)
            if prefix_uri == PREFIX:
                self.listings += 1
                if self.listings == 6:  # the last look of `verify`: from here on it is refused
                    put(platform, {"tokenizer.json": FILES["tokenizer.json"]})
            return found

    (message,) = reconcile(replace(platform, store=Mending()))
    assert "sha256" in message
    assert reconcile(platform) == []
    assert [base.version for base in registered(platform)["smol"]] == ["v1"]


def other():
    return model_of(model_weights(seed=1))


@pytest.mark.parametrize("prefix", [PREFIX, f"{ROOT}/elsewhere"])
def test_the_same_version_with_other_content_is_refused_once_and_nothing_changes(platform, prefix):
    put(platform, WHOLE)
    reconcile(platform)
    before = registered(platform)
    put(platform, other() | {Manifest.FILE_NAME: manifest_of(other())}, prefix)
    (message,) = reconcile(platform)
    assert "is ready already with other content" in message
    assert "publish it under a new version" in message
    assert reconcile(platform) == []
    assert registered(platform) == before


def test_a_refusal_is_reported_although_the_disk_is_full(platform, monkeypatch):
    put(platform, WHOLE | {"config.json": b"{}"})
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full_disk_error)
        first, second = reconcile(platform), reconcile(platform)
    assert first == second
    assert "config.json" in first[0]
    assert reconcile(platform) == first
    assert reconcile(platform) == []


def full_disk_error(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_copy_of_an_upload_is_the_same_version_and_is_not_read_again(platform):
    put(platform, WHOLE)
    reconcile(platform)
    before = registered(platform)
    put(platform, WHOLE, f"{ROOT}/copy")
    assert pending(platform, root_uri=ROOT) == ()
    assert registered(platform) == before


def test_a_new_version_over_an_old_one_is_a_version_of_its_own(platform):
    put(platform, WHOLE)
    reconcile(platform)
    put(platform, other() | {Manifest.FILE_NAME: manifest_of(other(), version="v2")})
    assert reconcile(platform) == []
    assert [base.version for base in registered(platform)["smol"]] == ["v1", "v2"]


@pytest.mark.parametrize(
    "rewritten",
    [
        manifest_of(FILES, parent="v0"),
        manifest_of(dict(reversed(FILES.items()))),
        json.dumps(json.loads(WHOLE[Manifest.FILE_NAME]), indent=7).encode(),
    ],
    ids=["another parent", "another order", "another layout"],
)
def test_an_equivalent_manifest_changes_nothing(platform, rewritten):
    put(platform, WHOLE)
    reconcile(platform)
    before = registered(platform)
    put(platform, {Manifest.FILE_NAME: rewritten})
    assert pending(platform, root_uri=ROOT) == ()
    assert registered(platform) == before


def test_an_additional_file_is_read_once_and_changes_nothing(platform):
    put(platform, WHOLE)
    reconcile(platform)
    before = registered(platform)
    more = FILES | {"README.md": b"hello"}
    put(platform, more | {Manifest.FILE_NAME: manifest_of(more)})
    assert reconcile(platform) == []
    assert pending(platform, root_uri=ROOT) == ()
    assert registered(platform) == before


@pytest.mark.parametrize("manifest", [b"", b"{", b"\xff", WHOLE[Manifest.FILE_NAME][:-40]])
def test_a_manifest_that_breaks_later_is_reported_once(platform, manifest):
    put(platform, WHOLE)
    reconcile(platform)
    before = registered(platform)
    put(platform, {Manifest.FILE_NAME: manifest})
    (message,) = reconcile(platform)
    assert "trans_peft_manifest.json: not a valid manifest" in message
    assert (reconcile(platform), registered(platform)) == ([], before)


def test_files_beside_those_of_the_manifest_are_refused_by_name(platform):
    put(platform, WHOLE | {"notes.txt": b"x", ".DS_Store": b""})
    (message,) = reconcile(platform)
    assert "notes.txt: not in the manifest" in message
    assert ".DS_Store: not in the manifest" in message


@pytest.mark.parametrize("name", ["empty.txt", "a folder/ünï cödé.txt", "100%25.txt", "a+b&c.txt"])
def test_empty_files_and_unusual_names_are_accepted(platform, name):
    files = FILES | {name: b""}
    put(platform, files | {Manifest.FILE_NAME: manifest_of(files)})
    assert reconcile(platform) == []
    assert [base.version for base in registered(platform)["smol"]] == ["v1"]


@pytest.mark.parametrize(
    "name", ["../up", "a//b", "a/../b", "x\u202ey", "zero\u200bwidth", "\ud800"]
)
def test_names_outside_the_prefix_are_refused(platform, name):
    files = FILES | {name: b"x"}
    put(platform, files | {Manifest.FILE_NAME: manifest_of(files)})
    (message,) = reconcile(platform)
    assert "the name" in message
    message.encode()  # the message can be printed in any case


def test_an_unreadable_upload_does_not_affect_others(platform):
    put(platform, WHOLE)
    put(platform, WHOLE, f"{ROOT}/closed")
    number = platform.catalog.register_manually("smol", f"{ROOT}/closed")

    class Closed(MemoryStore):
        def __init__(self):
            super().__init__()
            self._files = platform.store._files

        def list(self, prefix_uri):
            if prefix_uri.endswith("closed"):
                raise StoreError("S3 denies access")
            return super().list(prefix_uri)

    (message,) = reconcile(replace(platform, store=Closed()))
    assert "denies access" in message
    ready = [base for base in registered(platform)["smol"] if base.ready]
    assert [base.uri for base in ready] == [PREFIX]
    assert reconcile(platform) == []
    assert number not in [base.number for base in registered(platform)["smol"]]


def test_a_refusal_by_the_catalog_is_reported_once(platform):
    put(platform, WHOLE)

    class Choosy:
        families, versions = platform.catalog.families, platform.catalog.versions

        def make_ready(self, *_, **__):
            raise InvalidSpecError("'smol' is registered already, and not as a base")

    choosy = replace(platform, catalog=Choosy())
    with pytest.raises(InvalidSpecError):
        ingest(Upload(PREFIX), choosy)
    assert pending(choosy, root_uri=ROOT) == ()


def test_after_a_kill_at_any_step_the_next_ingestion_completes(tmp_path):
    class Killing(MemoryStore):
        left = 0

        def tick(self):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt

        def list(self, prefix_uri):
            self.tick()
            return super().list(prefix_uri)

        def read(self, uri, **how):
            self.tick()
            return super().read(uri, **how)

    expected, kills = undisturbed(tmp_path / "undisturbed"), 0
    while True:
        platform = replace(memory_platform(tmp_path / f"{kills}"), store=Killing())
        platform.store.left = 1000
        put(platform, WHOLE)
        platform.store.left = kills
        try:
            ingest(Upload(PREFIX), platform)
            break
        except KeyboardInterrupt:
            kills += 1
        assert registered(platform) == {}
        platform.store.left = 1000
        assert reconcile(platform) == []
        assert registered(platform) == expected
    assert kills > 8
