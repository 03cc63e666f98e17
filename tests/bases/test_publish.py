"""Published uploads pass ingestion; others are refused before anything is sent."""

import io

import pytest

from tests.bases.uploads import URI, model_of, model_weights, store_of
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.bases.publish import publish
from trans_peft.bases.upload import verify
from trans_peft.domain.base import Manifest
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import MemoryStore
from trans_peft.errors import NotFoundError, UploadError


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", model_of())


def publish_v1(folder, store, uri=URI, **changes):
    return publish(folder, uri, family="smol", version="v1", store=store, **changes)


def test_what_is_published_is_verified(folder):
    store = MemoryStore()
    manifest = publish_v1(folder, store, parent="v0")
    found = verify(URI, store)
    assert found.manifest == manifest
    assert (manifest.family, manifest.version, manifest.parent) == ("smol", "v1", "v0")
    assert found.fingerprint == fingerprint(str(folder), FileStore())


def test_the_manifest_is_written_last(folder):
    store, written = MemoryStore(), []

    class Watching:
        list, read = store.list, store.read

        def write(self, uri, data):
            written.append(uri)
            store.write(uri, data)

    publish_v1(folder, Watching())
    assert written[-1] == f"{URI}/{Manifest.FILE_NAME}"
    assert len(written) == 5


def test_publishing_again_sends_nothing(folder):
    store = MemoryStore()
    first = publish_v1(folder, store)

    class ReadOnly:
        list, read = store.list, store.read

        def write(self, uri, data):
            pytest.fail(f"{uri} was written")

    assert publish_v1(folder, ReadOnly()) == first


def test_an_interrupted_upload_is_completed(folder):
    store = MemoryStore()
    store.write(f"{URI}/model.safetensors", io.BytesIO(b"half of i"))
    publish_v1(folder, store)
    assert verify(URI, store).verified == "manifest"


def test_another_upload_is_never_overwritten(folder, tmp_path):
    store = MemoryStore()
    publish_v1(folder, store)
    other = write(tmp_path / "other", model_of(model_weights(seed=1)))
    with pytest.raises(UploadError, match="another prefix"):
        publish_v1(other, store)
    assert verify(URI, store).fingerprint == fingerprint(str(folder), FileStore())


def test_foreign_files_in_the_prefix_are_reported_before_anything_is_sent(folder):
    store = store_of({"somebody_elses.txt": b"x"})
    with pytest.raises(UploadError, match=r"somebody_elses\.txt"):
        publish_v1(folder, store)
    assert [file.name for file in store.list(URI)] == ["somebody_elses.txt"]


def test_all_problems_are_reported_before_anything_is_sent(folder):
    write(folder, {"pytorch_model.bin": b"", "config.json": b'{"auto_map": {"a": "b.C"}}'})
    store = MemoryStore()
    with pytest.raises(UploadError) as caught:
        publish_v1(folder, store)
    for reason in ("pytorch_model.bin: pickle", "remote code", "architectures"):
        assert caught.match(reason)
    assert store.list(URI) == ()


@pytest.mark.parametrize("family", ["", "a/b", "a\nb"])
def test_an_invalid_family_is_refused_before_anything_is_sent(folder, family):
    store = MemoryStore()
    with pytest.raises((UploadError, ValueError), match="family"):
        publish(folder, URI, family=family, version="v1", store=store)
    assert store.list(URI) == ()


def test_hidden_files_are_not_published(folder):
    write(folder, {".git/config": b"secret", ".env": b"secret"})
    manifest = publish_v1(folder, MemoryStore())
    assert not [file.name for file in manifest.files if file.name.startswith(".")]


def test_an_empty_folder_is_not_found(tmp_path):
    with pytest.raises(NotFoundError):
        publish_v1(tmp_path, MemoryStore())


def test_progress_ends_at_the_total(folder):
    seen = []
    publish_v1(folder, MemoryStore(), on_progress=lambda done, total: seen.append((done, total)))
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert seen[-1] == (2 * size, 2 * size)


@pytest.mark.servers
def test_a_base_is_published_to_s3_and_downloaded(servers, unique, tiny_base, tmp_path):
    from trans_peft.bases.cache import download
    from trans_peft.edges.stores import SchemeStore

    store, uri = SchemeStore(), f"s3://{servers.bucket}/{unique}/v1"
    publish_v1(tiny_base, store, uri)
    found = verify(uri, store)
    assert found.fingerprint == fingerprint(str(tiny_base), store)
    copy = download(uri, store, tmp_path, fingerprint=found.fingerprint)
    assert fingerprint(str(copy), store) == found.fingerprint
