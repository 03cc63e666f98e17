"""OpenSSF model signatures of uploads: what they cover, and which are refused."""

import base64
import contextlib
import hashlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bases.uploads import model_of
from trans_peft.bases.manifest import dump_manifest
from trans_peft.bases.publish import publish
from trans_peft.bases.signatures import SIGNATURE_NAME, sign, signed_manifest
from trans_peft.bases.upload import verify
from trans_peft.domain.base import Manifest, ManifestFile
from trans_peft.edges.memory import MemoryStore
from trans_peft.errors import InvalidSpecError, StoreError, UploadError

URI = "s3://bases/smol/v1"
CURVES = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}


MANIFEST_DIFFERS = r"Hash mismatch for .{0,2}trans_peft_manifest\.json"


def write_keys(folder: Path, name: str, key) -> tuple[Path, Path]:
    private, public = folder / f"{name}.key", folder / f"{name}.pem"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    made = {
        name: write_keys(folder, name, ec.generate_private_key(c)) for name, c in CURVES.items()
    }
    made["other"] = write_keys(folder, "other", ec.generate_private_key(ec.SECP256R1()))
    made["rsa"] = write_keys(folder, "rsa", rsa.generate_private_key(65537, 2048))
    made["k1"] = write_keys(folder, "k1", ec.generate_private_key(ec.SECP256K1()))
    return made


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    for name, data in model_of().items():
        (made / name).write_bytes(data)
    return made


def put(store, name, data):
    store.write(f"{URI}/{name}", io.BytesIO(data))


def get(store, name):
    with store.read(f"{URI}/{name}") as chunks:
        return b"".join(chunks)


def published(folder, key, version="v1"):
    """Store an upload without looking at its files: most tests are about the signature alone."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    listed = [
        ManifestFile(name, len(data), hashlib.sha256(data).hexdigest())
        for name, data in files.items()
    ]
    manifest, store = Manifest("smol", version, None, tuple(listed)), MemoryStore()
    files[Manifest.FILE_NAME] = dump_manifest(manifest)
    if key is not None:
        files[SIGNATURE_NAME] = sign(manifest, key)
    for name, data in files.items():
        put(store, name, data)
    return store


def check(store, public):
    return signed_manifest(URI, store, store.list(URI), str(public))


@pytest.mark.parametrize("curve", CURVES)
def test_a_signed_upload_is_accepted(folder, keys, curve):
    private, public = keys[curve]
    store = MemoryStore()
    publish(folder, URI, family="smol", version="v1", store=store, sign_key=private)
    manifest = check(store, public)
    assert (manifest.family, manifest.version) == ("smol", "v1")
    assert verify(URI, store).manifest == manifest
    assert SIGNATURE_NAME not in [file.name for file in manifest.files]


def test_publishing_again_signs_an_unsigned_upload(folder, keys):
    private, public = keys["P-256"]
    store = published(folder, None)
    with pytest.raises(UploadError, match=f"no {SIGNATURE_NAME}"):
        check(store, public)
    publish(folder, URI, family="smol", version="v1", store=store, sign_key=private)
    check(store, public)


def test_the_fingerprint_is_that_of_the_upload_without_a_signature(folder, keys):
    signed, plain = published(folder, keys["P-256"][0]), published(folder, None)
    assert verify(URI, signed) == verify(URI, plain)


def test_a_signature_of_model_signing_s_own_command_is_accepted(folder, keys):
    """A publisher needs none of our code: a folder with the files and the manifest is signed."""
    private, public = keys["P-256"]
    store = published(folder, None)
    (folder / Manifest.FILE_NAME).write_bytes(get(store, Manifest.FILE_NAME))
    subprocess.run(
        [
            *(sys.executable, "-m", "model_signing", "sign", "key", folder),
            *("--private_key", private, "--signature", folder / SIGNATURE_NAME),
        ],
        check=True,
        capture_output=True,
    )
    put(store, SIGNATURE_NAME, (folder / SIGNATURE_NAME).read_bytes())
    assert check(store, public).family == "smol"


def other_digest(manifest):
    return [ManifestFile(f.name, f.size, "0" * 64) for f in manifest.files]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"family": "other"}, MANIFEST_DIFFERS),
        ({"version": "v2"}, MANIFEST_DIFFERS),
        ({"parent": "v0"}, MANIFEST_DIFFERS),
        ({"files": lambda m: m.files[1:]}, "Missing files"),
        ({"files": lambda m: (*m.files, ManifestFile("x", 1, "0" * 64))}, "Extra files"),
        ({"files": other_digest}, "Hash mismatch for .{0,2}config.json"),
    ],
)
def test_a_signature_covers_all_of_the_manifest(folder, keys, changed, said):
    private, public = keys["P-256"]
    store = published(folder, private)
    manifest = check(store, public)
    recorded = {**vars(manifest)} | {
        k: v(manifest) if callable(v) else v for k, v in changed.items()
    }
    forged = Manifest(
        recorded["family"], recorded["version"], recorded["parent"], tuple(recorded["files"])
    )
    put(store, Manifest.FILE_NAME, dump_manifest(forged))
    with pytest.raises(UploadError, match=said):
        check(store, public)


def test_a_signature_by_another_key_or_over_another_upload_is_refused(folder, keys):
    private, public = keys["P-256"]
    store = published(folder, keys["other"][0])
    with pytest.raises(UploadError, match="is refused"):
        check(store, public)
    old = get(published(folder, private, version="v0"), SIGNATURE_NAME)
    put(store, SIGNATURE_NAME, old)
    with pytest.raises(UploadError, match="Hash mismatch"):
        check(store, public)


def edited(bundle, **changes):
    """Return a bundle with a payload that nobody signed."""
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    payload["predicate"] |= changes
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    return bundle


def test_a_payload_or_a_hint_that_was_edited_is_refused(folder, keys):
    private, public = keys["P-256"]
    store = published(folder, private)
    kept = get(store, SIGNATURE_NAME)
    for forge in (
        lambda b: edited(b, resources=[]),
        lambda b: edited(b, serialization={"method": "files", "ignore_paths": ["config.json"]}),
        lambda b: b["verificationMaterial"]["publicKey"].update(hint="x") or b,
        lambda b: b["dsseEnvelope"].update(signatures=[]) or b,
        lambda b: b["dsseEnvelope"].update(payloadType="text/plain") or b,
        lambda b: b.update(mediaType="x") or b,
        lambda b: b.pop("verificationMaterial") and b,
    ):
        put(store, SIGNATURE_NAME, json.dumps(forge(json.loads(kept))).encode())
        with pytest.raises(UploadError):
            check(store, public)
    put(store, SIGNATURE_NAME, kept)
    check(store, public)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b"-----BEGIN", b'{"a":' * 9999]
)
def test_an_invalid_signature_file_is_refused_with_a_reason(folder, keys, content):
    store = published(folder, None)
    put(store, SIGNATURE_NAME, content)
    with pytest.raises(UploadError, match="the signature of the upload"):
        check(store, keys["P-256"][1])


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0), other=st.binary(max_size=3))
def test_a_signature_with_a_changed_byte_is_refused_or_equivalent(keys, place, other):
    manifest = Manifest("f", "v1", None, (ManifestFile("a", 1, "1" * 64),))
    store = MemoryStore()
    kept = sign(manifest, keys["P-256"][0])
    at = place % len(kept)  # every signing makes another signature, of another length
    put(store, Manifest.FILE_NAME, dump_manifest(manifest))
    put(store, SIGNATURE_NAME, kept[:at] + other + kept[at + 1 :])
    with contextlib.suppress(UploadError):
        assert check(store, keys["P-256"][1]) == manifest


def test_a_huge_signature_is_never_read(folder, keys, monkeypatch):
    monkeypatch.setattr("trans_peft.bases.signatures.MAX_SIGNATURE_BYTES", 10)
    store = published(folder, keys["P-256"][0])
    with pytest.raises(UploadError, match="at most 10 are allowed"):
        check(store, keys["P-256"][1])


@pytest.mark.parametrize("name", ["rsa", "k1", "missing", "private", "text"])
def test_an_unusable_public_key_is_a_store_error(folder, keys, tmp_path, name):
    store = published(folder, keys["P-256"][0])
    (tmp_path / "text.pem").write_text("no key")
    path = {
        "missing": tmp_path / "missing.pem",
        "private": keys["P-256"][0],
        "text": tmp_path / "text.pem",
    }.get(name) or keys[name][1]
    with pytest.raises(StoreError, match="TRANS_PEFT_FAMILIES"):
        check(store, path)


@pytest.mark.parametrize("name", ["rsa", "k1", "missing"])
def test_an_unusable_private_key_is_reported_before_anything_is_written(
    folder, keys, tmp_path, name
):
    path = tmp_path / "missing.key" if name == "missing" else keys[name][0]
    store = MemoryStore()
    with pytest.raises(InvalidSpecError, match="cannot sign"):
        publish(folder, URI, family="smol", version="v1", store=store, sign_key=path)
    assert store.list(URI) == ()


def test_files_of_a_signed_upload_are_read_once(folder, keys):
    """The hashes of the one pass are those that the signature covers."""
    store = published(folder, keys["P-256"][0])
    reads = []
    plain = store.read
    store.read = lambda uri, **given: reads.append(uri.rpartition("/")[2]) or plain(uri, **given)
    check(store, keys["P-256"][1])
    verify(URI, store)
    assert reads.count("model.safetensors") == 1


def test_without_the_extra_the_error_names_the_package(folder, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(ModuleNotFoundError, match="signatures"):
        sign(Manifest("f", "v1", None, (ManifestFile("a", 1, "1" * 64),)), keys["P-256"][0])
    store = published(folder, None)
    shutil.copy(keys["P-256"][1], folder)
    put(store, SIGNATURE_NAME, b"{}")
    with pytest.raises(StoreError, match="signatures"):
        check(store, keys["P-256"][1])
