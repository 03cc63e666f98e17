"""Verification of uploads, and all reasons why one is refused."""

import hashlib
import io
import json
from collections.abc import Callable
from contextlib import contextmanager

import pytest

from tests.bases.uploads import CONFIG, SETTINGS, URI, folder_of, store_of
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.bases.manifest import MAX_MANIFEST_BYTES, dump_manifest, parse_manifest
from trans_peft.bases.upload import verify
from trans_peft.domain.base import Manifest, ManifestFile
from trans_peft.edges.memory import MemoryStore
from trans_peft.errors import IntegrityError, NotFoundError, UploadError

Files = dict[str, bytes]


def stated(files: Files) -> list[dict]:
    return [
        {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    ]


def manifest_of(contents: Files, **changes: object) -> bytes:
    whole = {"format": "trans-peft/base-manifest/1", "family": "smol", "version": "v1",
             "parent": None, "files": stated(contents)}  # fmt: skip
    return json.dumps(whole | changes).encode()


def upload(files: Files, manifest: bytes | None = None) -> MemoryStore:
    return store_of({**files, Manifest.FILE_NAME: manifest or manifest_of(files)})


def test_a_complete_upload_is_verified_against_its_manifest():
    store = upload(folder_of())
    found = verify(URI, store)
    assert (found.verified, found.manifest.family, found.manifest.version) == (
        "manifest", "smol", "v1",
    )  # fmt: skip
    assert found.fingerprint == fingerprint(URI, store)


def test_each_file_is_read_once():
    store, reads = upload(folder_of()), []

    class Counting:
        list = store.list

        def read(self, uri, *, etag=None):
            reads.append(uri)
            return store.read(uri, etag=etag)

    verify(URI, Counting())
    assert sorted(reads) == sorted({f"{URI}/{file.name}" for file in store.list(URI)})


def test_without_a_manifest_the_structure_is_verified():
    found = verify(URI, store_of(folder_of()))
    assert (found.verified, found.manifest) == ("structure", None)
    assert found.fingerprint == fingerprint(URI, store_of(folder_of()))


def test_an_empty_prefix_is_not_found():
    with pytest.raises(NotFoundError):
        verify(URI, MemoryStore())


WEIGHTS = "model.safetensors"


def flipped(files: Files) -> Files:
    data = bytearray(files[WEIGHTS])
    data[-1] ^= 1
    return files | {WEIGHTS: bytes(data)}


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (flipped, r"model\.safetensors: sha256 [0-9a-f]{64}, the manifest lists [0-9a-f]{64}"),
        (lambda files: files | {WEIGHTS: files[WEIGHTS][:-1]}, r"bytes, the manifest lists \d+"),
        (lambda files: files | {"notes.txt": b"x"}, "notes.txt: not in the manifest"),
        (
            lambda files: {n: d for n, d in files.items() if n != WEIGHTS},
            "model.safetensors: missing, but listed in the manifest",
        ),
        (
            lambda files: files | {"tokenizer.json": b"{}"},
            "tokenizer.json: 2 bytes, the manifest lists",
        ),
    ],
    ids=["one-bit", "one-byte-less", "one-file-more", "one-file-less", "exchanged"],
)
def test_content_that_differs_from_the_manifest_is_refused(
    tamper: Callable[[Files], Files], reason: str
):
    files = folder_of()
    store = store_of({**tamper(files), Manifest.FILE_NAME: manifest_of(files)})
    with pytest.raises(UploadError, match=reason):
        verify(URI, store)


UNWANTED = {
    "pytorch_model.bin": "pickle",
    "weights.PT": "pickle",
    "x.pth": "pickle",
    "x.ckpt": "pickle",
    "deep/inside/x.pkl": "pickle",
    "modeling_evil.py": "remote code",
    "x.so": "remote code",
    "adapter_config.json": "adapter",
    "../outside.json": "could leave the prefix",
    "a/../../outside.json": "could leave the prefix",
    "/etc/passwd": "could leave the prefix",
    "a//b": "could leave the prefix",
    "a/./b": "could leave the prefix",
    "a\\b": "not portable",
    "C:/x": "not portable",
    "a\nb": "control characters",
    "a\x00b": "control characters",
    "x" * 2000: "2000 characters",
}


@pytest.mark.parametrize("with_manifest", [True, False], ids=["manifest", "structure"])
@pytest.mark.parametrize(("name", "reason"), UNWANTED.items(), ids=lambda value: repr(value)[:30])
def test_forbidden_file_names_are_refused(name, reason, with_manifest):
    files = folder_of() | {name: b"x"}
    store = upload(files) if with_manifest else store_of(files)
    with pytest.raises(UploadError, match=reason):
        verify(URI, store)


def test_a_manifest_with_names_outside_of_the_prefix_is_refused():
    files = folder_of()
    outside = [*stated(files), {"name": "../x.safetensors", "size": 0, "sha256": "0" * 64}]
    with pytest.raises(UploadError, match="could leave the prefix"):
        verify(URI, upload(files, manifest_of(files, files=outside)))


@pytest.mark.parametrize(
    "files",
    [
        {"config_json": CONFIG | {"auto_map": {"AutoModel": "modeling_evil.Evil"}}},
        {"config_json": CONFIG | {"text_config": {"auto_map": {"AutoModel": "x.Y"}}}},
        {"config_json": CONFIG | {"custom_pipelines": {"evil": {"impl": "x.Y"}}}},
        {"tokenizer_config_json": SETTINGS | {"auto_map": {"AutoTokenizer": ["x.Y", None]}}},
        {"generation_config_json": {"auto_map": {"x": "y"}}},
    ],
)
def test_a_config_that_needs_remote_code_is_refused(files):
    for store in (upload(folder_of(**files)), store_of(folder_of(**files))):
        with pytest.raises(UploadError, match="needs remote code"):
            verify(URI, store)


GOOD = {"name": "config.json", "size": 2, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        (b"{", "JSON"),
        (b"[]", "JSON"),
        (b"\xff\xfe", "JSON"),
        (manifest_of({}, files=[GOOD], format="somebody/else/1"), "format"),
        (manifest_of({}, files=[GOOD], format=None), "format"),
        (manifest_of({}, files=[GOOD], family=7), "family"),
        (manifest_of({}, files=[GOOD], family=""), "family"),
        (manifest_of({}, files=[GOOD], family="a/b"), "family"),
        (manifest_of({}, files=[GOOD], version="v\n1"), "version"),
        (manifest_of({}, files=[GOOD], parent=1), "parent"),
        (manifest_of({}, files=[GOOD], files_=[]), "files_"),
        (manifest_of({}, files=[]), "no files"),
        (manifest_of({}, files=[GOOD, GOOD]), "lists these files twice: config.json"),
        (manifest_of({}, files=[GOOD | {"size": "2"}]), "size"),
        (manifest_of({}, files=[GOOD | {"size": -1}]), "size"),
        (manifest_of({}, files=[GOOD | {"size": 2**60}]), "size"),
        (manifest_of({}, files=[GOOD | {"size": True}]), "size"),
        (manifest_of({}, files=[GOOD | {"sha256": "0" * 63}]), "sha256"),
        (manifest_of({}, files=[GOOD | {"sha256": "Z" * 64}]), "sha256"),
        (manifest_of({}, files=[GOOD | {"md5": "x"}]), "md5"),
        (b" " * (MAX_MANIFEST_BYTES + 1), "at most"),
    ],
)
def test_an_invalid_manifest_is_refused(manifest, reason):
    with pytest.raises(
        UploadError, match=f"(?s)trans_peft_manifest.json: not a valid manifest: .*{reason}"
    ):
        verify(URI, upload(folder_of(), manifest))


def test_a_manifest_can_be_written_and_read():
    files = (ManifestFile("b", 1, "0" * 64), ManifestFile("a", 0, "1" * 64))
    manifest = Manifest("smol", "v2", "v1", files)
    assert parse_manifest(dump_manifest(manifest)) == Manifest("smol", "v2", "v1", files[::-1])


def test_all_problems_are_reported_at_once():
    files = folder_of(config_json=CONFIG | {"auto_map": {"x": "y.Z"}})
    there = flipped(files) | {"x.bin": b"", "extra.txt": b""}
    store = store_of({**there, Manifest.FILE_NAME: manifest_of(files)})
    with pytest.raises(UploadError) as caught:
        verify(URI, store)
    for reason in (
        "remote code",
        "x.bin: pickle",
        "extra.txt: not in",
        "model.safetensors: sha256",
    ):
        assert caught.match(reason)


def test_no_file_is_read_while_files_are_missing():
    files = folder_of()
    there = {"x.bin": b"", WEIGHTS: b"half", "config.json": files["config.json"]}
    store, reads = store_of({**there, Manifest.FILE_NAME: manifest_of(files)}), []

    class Counting:
        list = store.list

        def read(self, uri, *, etag=None):
            reads.append(uri)
            return store.read(uri, etag=etag)

    with pytest.raises(UploadError, match="is not complete") as caught:
        verify(URI, Counting())
    for reason in ("tokenizer.json: missing", "model.safetensors: 4 bytes", "x.bin: pickle"):
        assert caught.match(reason)
    assert reads == [f"{URI}/{Manifest.FILE_NAME}"]


@pytest.mark.parametrize("change", ["written", "removed"])
@pytest.mark.parametrize("file", [WEIGHTS, Manifest.FILE_NAME])
@pytest.mark.parametrize("when", ["before", "during"])
def test_an_upload_that_changes_while_it_is_read_is_not_refused(when, file, change):
    store = upload(folder_of())

    class Changing:
        list = store.list

        @contextmanager
        def read(self, uri, *, etag=None):
            if uri.endswith(file) and when == "before":
                self.change(uri)
            with store.read(uri, etag=etag) as chunks:
                yield chunks
            if uri.endswith(file) and when == "during":
                self.change(uri)

        def change(self, uri):
            if change == "removed":
                store.remove(uri)
            else:
                store.write(uri, io.BytesIO(b"other"))

    with pytest.raises(IntegrityError, match="changed while it was being read"):
        verify(URI, Changing())


def test_a_name_that_is_a_file_and_a_folder_is_refused():
    files = folder_of() | {"x": b"1", "x/y": b"2"}
    with pytest.raises(UploadError, match="x: both a file and a folder"):
        verify(URI, upload(files))


def test_a_manifest_of_a_hundred_megabytes_is_never_read():
    store = upload(folder_of(), b" " * 100_000_000)

    class Guarded:
        list = store.list

        def read(self, uri, *, etag=None):
            assert not uri.endswith(Manifest.FILE_NAME)
            return store.read(uri, etag=etag)

    with pytest.raises(UploadError, match="it has 100000000 bytes; at most"):
        verify(URI, Guarded())
