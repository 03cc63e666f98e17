"""OpenSSF model signatures (`model-signing`) of uploads, by a pair of elliptic-curve keys.

A signature is a file beside the manifest. It covers the manifest, and so the family, the version
and the parent, and every file that the manifest lists, each by its SHA-256. No file is read for it:
ingestion compares the files with the manifest anyway, in its one pass.

    model_signing sign key DIR --private_key KEY --signature DIR/trans_peft_manifest.sig

writes the same for a folder that holds the files and the manifest. Only the methods with plain keys
are used, so nothing here asks Sigstore's servers.
"""

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trans_peft.artifacts import child_uri
from trans_peft.bases.manifest import MAX_MANIFEST_BYTES, dump_manifest, parse_manifest
from trans_peft.domain.base import Manifest
from trans_peft.errors import (
    IntegrityError,
    InvalidSpecError,
    NotFoundError,
    StoreError,
    UploadError,
)
from trans_peft.extras import explaining_missing_extras
from trans_peft.ports import ArtifactStore, StoredFile

__all__ = ["MAX_SIGNATURE_BYTES", "SIGNATURE_NAME", "sign", "signed_manifest"]

SIGNATURE_NAME = "trans_peft_manifest.sig"
"""The file's name, directly below an upload's prefix."""

MAX_SIGNATURE_BYTES = 16 << 20
"""A larger signature is never read. That of the largest manifest has about 12 MiB."""


def sign(manifest: Manifest, private_key: Path) -> bytes:
    """Return the signature of an upload. InvalidSpecError if the key (PEM) cannot sign.

    Raises ModuleNotFoundError without the extra `signatures`.
    """
    with explaining_missing_extras():
        from model_signing import signing
    with tempfile.TemporaryDirectory(prefix="trans-peft-") as folder:
        target = Path(folder, SIGNATURE_NAME)
        try:
            config = signing.Config().use_elliptic_key_signer(private_key=private_key)
            config.set_hashing_config(_Known(_covered(manifest, dump_manifest(manifest))))
            config.sign(Path(folder), target)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InvalidSpecError(
                f"{private_key} cannot sign",
                expected="a private key on one of the curves P-256, P-384 and P-521, PEM, "
                "without a password",
                found=f"{type(error).__name__}: {error}",
                do="openssl ecparam -name prime256v1 -genkey -noout -out KEY",
            ) from error
        return target.read_bytes()


def signed_manifest(
    uri: str, store: ArtifactStore, there: tuple[StoredFile, ...], public_key: str
) -> Manifest:
    """Return the manifest of an upload whose signature is right.

    Raises UploadError if the upload has no manifest or no signature, or the signature is not by
    the key's owner or does not cover just this manifest and its files; IntegrityError if a file
    changes meanwhile; StoreError if the key cannot be used, which says nothing about the upload.
    """
    files = {file.name: file for file in there}
    text = _read(uri, store, files, Manifest.FILE_NAME, MAX_MANIFEST_BYTES)
    signature = _read(uri, store, files, SIGNATURE_NAME, MAX_SIGNATURE_BYTES)
    manifest = parse_manifest(text)
    _check(uri, signature, _covered(manifest, text), public_key)
    return manifest


def _check(uri: str, signature: bytes, covered: Mapping[str, str], public_key: str) -> None:
    config = _verifier(public_key)
    config.set_hashing_config(_Known(covered))
    with tempfile.TemporaryDirectory(prefix="trans-peft-") as folder:
        path = Path(folder, SIGNATURE_NAME)
        path.write_bytes(signature)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the library prints a warning
                config.verify(Path(folder), path)
        # The library parses what anybody uploaded: no list of its exceptions is complete.
        except Exception as error:
            why = str(error) or "the signature is not by the owner of the family's key"
            raise UploadError(
                f"the signature of the upload {uri} is refused",
                expected=f"{SIGNATURE_NAME}: an OpenSSF model signature for the family's key that "
                f"covers {Manifest.FILE_NAME} and each file in it, by SHA-256",
                found=f"{type(error).__name__}: {why[:1000]}",
                do="sign it with `trans-peft publish --sign-key KEY`, with the family's own key",
            ) from error


def _verifier(public_key: str) -> Any:
    """Return model-signing's configuration with the key. StoreError: it cannot be used here."""
    try:
        with explaining_missing_extras():
            from model_signing import verifying
        return verifying.Config().use_elliptic_key_verifier(public_key=Path(public_key))
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise StoreError(
            f"the public key {public_key} cannot be used to check signatures on this worker",
            expected="a public key on one of the curves P-256, P-384 and P-521, PEM",
            found=f"{type(error).__name__}: {error}",
            do="correct the path in TRANS_PEFT_FAMILIES, or install trans-peft[signatures]",
        ) from error


def _covered(manifest: Manifest, text: bytes) -> dict[str, str]:
    """Return what the signature must cover: file name -> SHA-256."""
    files = {file.name: file.sha256 for file in manifest.files}
    return {**files, Manifest.FILE_NAME: hashlib.sha256(text).hexdigest()}


class _Known:
    """model-signing's hashing configuration for files whose hashes are known already."""

    def __init__(self, sha256_of: Mapping[str, str]) -> None:
        self._sha256_of = sha256_of

    def hash(self, model_path: object, *, files_to_hash: object = None) -> Any:
        """Return model-signing's manifest; neither argument is looked at."""
        from model_signing import hashing, manifest

        described = manifest.SerializationType.from_args(
            {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
        )
        items = [
            described.new_item(name, hashing.hashing.Digest("sha256", bytes.fromhex(sha256)))
            for name, sha256 in sorted(self._sha256_of.items())
        ]
        return manifest.Manifest("base", items, described)

    def add_ignored_paths(self, **_: object) -> None:
        """Ignore no file, whatever the signer ignored: the manifest says which files there are."""


def _read(
    uri: str, store: ArtifactStore, files: Mapping[str, StoredFile], name: str, limit: int
) -> bytes:
    if name not in files:
        raise UploadError(
            f"the upload {uri} is not signed",
            expected=f"{Manifest.FILE_NAME} and {SIGNATURE_NAME}: its family has a key",
            found=f"no {name}",
            do="sign it with `trans-peft publish --sign-key KEY`",
        )
    if files[name].size > limit:
        raise UploadError(f"{name} has {files[name].size} bytes; at most {limit} are read")
    try:
        with store.read(child_uri(uri, name), etag=files[name].etag) as chunks:
            return b"".join(chunks)
    except (IntegrityError, NotFoundError) as error:
        raise IntegrityError(f"{name} of {uri} changed while it was being read") from error
