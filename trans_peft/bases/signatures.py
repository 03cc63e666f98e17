"""OpenSSF model signatures (`model-signing`) of uploads, with elliptic-curve keys.

A signature is a file beside the manifest. It covers the manifest (and with it the family, the
version and the parent) and the SHA-256 of every file that the manifest lists. Verifying it reads
none of these files: ingestion compares them with the manifest.

    model_signing sign key DIR --private_key KEY --signature DIR/trans_peft_manifest.sig

writes the same signature for a folder that contains the files and the manifest. Only methods with
plain keys are used. They need no Sigstore server.
"""

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trans_peft.artifacts import read_file
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
"""Name of the signature file, directly below the prefix of an upload."""

MAX_SIGNATURE_BYTES = 16 << 20
"""Limit on the size of a signature. That of the largest manifest has about 12 MiB."""


def sign(manifest: Manifest, private_key: Path) -> bytes:
    """Return the signature of an upload. `private_key` is a PEM file.

    Raises InvalidSpecError if the key cannot sign, ModuleNotFoundError without the extra
    `signatures`.
    """
    with explaining_missing_extras():
        from model_signing import signing
    with tempfile.TemporaryDirectory(prefix="trans-peft-") as folder:
        target = Path(folder, SIGNATURE_NAME)
        try:
            config = signing.Config().use_elliptic_key_signer(private_key=private_key)
            config.set_hashing_config(_KnownHashes(_covered(manifest, dump_manifest(manifest))))
            config.sign(Path(folder), target)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InvalidSpecError(
                f"the private key {private_key} cannot sign",
                expected="a private key on one of the curves P-256, P-384 and P-521, PEM, "
                "without a password",
                found=f"{type(error).__name__}: {error}",
                do="create a key: openssl ecparam -name prime256v1 -genkey -noout -out KEY",
            ) from error
        return target.read_bytes()


def signed_manifest(
    uri: str, store: ArtifactStore, listing: tuple[StoredFile, ...], public_key: str
) -> Manifest:
    """Verify the signature of an upload, and return its manifest.

    `listing` are the files of the upload. Raises UploadError if there is no manifest or no
    signature, if the signature was made with another key, or if it does not cover exactly this
    manifest and its files; IntegrityError if a file changes meanwhile; StoreError if the public key
    cannot be used, which does not depend on the upload.
    """
    files = {file.name: file for file in listing}
    text = _read(uri, store, files, Manifest.FILE_NAME, MAX_MANIFEST_BYTES)
    signature = _read(uri, store, files, SIGNATURE_NAME, MAX_SIGNATURE_BYTES)
    manifest = parse_manifest(text)
    _check(uri, signature, _covered(manifest, text), public_key)
    return manifest


def _check(uri: str, signature: bytes, covered: Mapping[str, str], public_key: str) -> None:
    config = _verifier(public_key)
    config.set_hashing_config(_KnownHashes(covered))
    with tempfile.TemporaryDirectory(prefix="trans-peft-") as folder:
        path = Path(folder, SIGNATURE_NAME)
        path.write_bytes(signature)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # model_signing prints a warning
                config.verify(Path(folder), path)
        # model_signing parses untrusted files, and documents no list of its exceptions.
        except Exception as error:
            why = str(error) or "the signature was made with another key"
            raise UploadError(
                f"the signature of the upload {uri} is refused",
                expected=f"{SIGNATURE_NAME}: an OpenSSF model signature for the family's key that "
                f"covers {Manifest.FILE_NAME} and each file in it, by SHA-256",
                found=f"{type(error).__name__}: {why[:1000]}",
                do="sign it with `trans-peft publish --sign-key KEY` and the key of the family",
            ) from error


def _verifier(public_key: str) -> Any:
    """Return model-signing's configuration with the key. StoreError if it cannot be used."""
    try:
        with explaining_missing_extras():
            from model_signing import verifying
        return verifying.Config().use_elliptic_key_verifier(public_key=Path(public_key))
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise StoreError(
            f"the public key {public_key} cannot be used to check signatures on this worker",
            expected="a public key on one of the curves P-256, P-384 and P-521, PEM",
            found=f"{type(error).__name__}: {error}",
            do="correct the path in TRANS_PEFT_FAMILIES, or install the extra `signatures`",
        ) from error


def _covered(manifest: Manifest, text: bytes) -> dict[str, str]:
    """Return file name -> SHA-256 of the files that a signature must cover."""
    files = {file.name: file.sha256 for file in manifest.files}
    return {**files, Manifest.FILE_NAME: hashlib.sha256(text).hexdigest()}


class _KnownHashes:
    """A hashing configuration of model-signing for files whose hashes are known."""

    def __init__(self, sha256_of: Mapping[str, str]) -> None:
        self._sha256_of = sha256_of

    def hash(self, model_path: object, *, files_to_hash: object = None) -> Any:
        """Return model-signing's manifest. Both arguments are ignored."""
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
        """Do nothing: the manifest determines which files are covered."""


def _read(
    uri: str, store: ArtifactStore, files: Mapping[str, StoredFile], name: str, limit: int
) -> bytes:
    if name not in files:
        raise UploadError(
            f"the upload {uri} is not signed",
            expected=f"{Manifest.FILE_NAME} and {SIGNATURE_NAME}, because its family has a key",
            found=f"no {name}",
            do="sign it with `trans-peft publish --sign-key KEY`",
        )
    if files[name].size > limit:
        raise UploadError(f"{name} has {files[name].size} bytes; at most {limit} are allowed")
    try:
        return read_file(uri, files[name], store)
    except (IntegrityError, NotFoundError) as error:
        raise IntegrityError(f"{name} of {uri} changed while it was being read") from error
