"""Ingest base versions: verify uploads and registered versions, and make them ready.

An upload in InternLM2's layout contains code, which is never run. Its conversion to the Llama
layout is published beside the upload, and the converted files become the base version.
"""

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from trans_peft.artifacts import child_uri
from trans_peft.bases.converters import convert, converted_uri, needs_conversion
from trans_peft.bases.model_check import check_checkpoint
from trans_peft.bases.publish import publish
from trans_peft.bases.signatures import signed_manifest
from trans_peft.bases.upload import changed, read_manifest, verify
from trans_peft.domain.base import BaseVersion, Manifest, Upload
from trans_peft.domain.identity import content_sha256
from trans_peft.errors import (
    IntegrityError,
    InvalidSpecError,
    NotFoundError,
    StoreError,
    TransPeftError,
    UploadError,
    translating_full_disk_errors,
)
from trans_peft.lifecycle.base_drift import describe_drift
from trans_peft.ports import Platform, StoredFile

__all__ = ["ingest", "pending"]


def ingest(upload: Upload, platform: Platform) -> BaseVersion:
    """Verify an upload against its manifest, fingerprint it, and make it ready.

    The files must match the model that loads them exactly (`bases.model_check`). If the upload is
    ready already, the existing version is returned. The version of an InternLM2 upload has the URI
    of its converted files. The version records how far its weights moved from its predecessor.

    Raises UploadError with all reasons for a refusal, for example a place that is not configured
    for the family, or a wrong signature. Raises InvalidSpecError if the catalog does not accept the
    family or the URI. In both cases nothing becomes ready, and `pending` leaves the upload out
    until one of its files changes. Raises IntegrityError if a file changes during the read; the
    next `pending` returns the upload again.
    """
    uri, source = upload.uri, "registered" if upload.registered else "upload"
    # Named after the files as they are before the read, so that a later change invalidates it.
    record = _refusal_file(upload, platform)
    try:
        expected = _admitted(upload, platform)
        if needs_conversion(uri, platform.store):
            uri, expected = _publish_converted(upload, expected, platform)
            source += f", converted from {upload.uri}"
        verified = verify(uri, platform.store)
        if verified.manifest != expected:  # the manifest was replaced after it was admitted
            raise changed(uri, [Manifest.FILE_NAME])
        check_checkpoint(verified.checkpoint, f"the upload {uri}")
        family, version, parent = _claimed(upload, verified.manifest)
        claimed_sha256 = verified.manifest.sha256 if verified.manifest else ""
        draft = BaseVersion(
            family,
            version,
            uri,
            number=upload.registered.number if upload.registered else 0,
            parent=parent,
            manifest_sha256=claimed_sha256,
        )
        ready = platform.catalog.make_ready(
            replace(draft, drift=describe_drift(draft, verified.fingerprint, platform)),
            fingerprint=verified.fingerprint,
            source=f"{source}, {verified.verified}",
        )
    except (UploadError, NotFoundError, InvalidSpecError) as refusal:
        _record_refusal(record, upload, str(refusal))
        raise
    if ready.manifest_sha256 != claimed_sha256:
        _record_refusal(record, upload, f"{ready} has the same content, from {ready.uri}")
    return ready


def pending(platform: Platform, *, root_uri: str = "") -> tuple[Upload, ...]:
    """Return the uploads below `root_uri` and the registered versions that may become ready.

    Uploads whose manifest is that of a ready version are left out. Refused uploads are left out
    until one of their files changes. An upload whose files cannot be listed is returned, so that
    `ingest` reports the error.
    """
    versions = _readable_versions(platform)
    root = root_uri.rstrip("/")
    manifests = {
        child_uri(root, file.name).removesuffix(f"/{Manifest.FILE_NAME}"): file
        for file in (platform.store.list(root) if root else ())
        if f"/{file.name}".endswith(f"/{Manifest.FILE_NAME}")
    }
    registered = [Upload(base.uri, registered=base) for base in versions if not base.ready]
    conversions = {converted_uri(uri) for uri in (*manifests, *(item.uri for item in registered))}
    uploaded = [
        Upload(uri)
        for uri, file in manifests.items()
        if uri not in conversions and not _is_ingested(uri, file, versions, platform)
    ]
    return tuple(
        item
        for item in (*uploaded, *registered)
        if item.uri not in conversions and not _is_refusal_recorded(item, platform)
    )


def _readable_versions(platform: Platform) -> list[BaseVersion]:
    """Return the versions of all families, without families that cannot be read."""
    versions: list[BaseVersion] = []
    for family in platform.catalog.families():
        try:
            versions += platform.catalog.versions(family)
        except StoreError:
            raise  # the catalog did not respond, so the family did not fail
        except TransPeftError:  # reconcile of that family reports it, or it was just deleted
            continue
    return versions


def _is_ingested(
    uri: str, manifest: StoredFile, versions: Sequence[BaseVersion], platform: Platform
) -> bool:
    """Return whether the upload, or its conversion, is a version in the catalog already."""
    known = {base.uri.rstrip("/"): base for base in versions}
    if converted_uri(uri) in known or (uri in known and not known[uri].manifest_sha256):
        return True
    try:
        there = (replace(manifest, name=Manifest.FILE_NAME),)
        claimed = read_manifest(uri, platform.store, there)
    except Exception:  # reported by `ingest`; other uploads are not affected
        return False
    return claimed is not None and claimed.sha256 in {base.manifest_sha256 for base in versions}


def _admitted(upload: Upload, platform: Platform) -> Manifest | None:
    """Return the manifest of an upload that its family accepts; None without a manifest.

    Raises UploadError if the family accepts no versions from this place, or if it has a key and the
    signature is wrong. Only the manifest and the signature are read.
    """
    uri, store = upload.uri, platform.store
    there = store.list(uri)
    try:
        manifest = read_manifest(uri, store, there)
    except UploadError:
        return None  # `verify` raises it again, together with all other reasons
    except (IntegrityError, NotFoundError) as error:
        raise changed(uri, [Manifest.FILE_NAME]) from error
    named = upload.registered or manifest
    if named is None:
        return None
    platform.owners.check(named.family, uri, upload)
    if key := platform.owners.key(named.family):
        signed = signed_manifest(uri, store, there, key)
        if signed != manifest:
            raise changed(uri, [Manifest.FILE_NAME])
    return manifest


def _publish_converted(
    upload: Upload, admitted: Manifest | None, platform: Platform
) -> tuple[str, Manifest]:
    """Convert an InternLM2 upload to the Llama layout; return the new URI and its manifest.

    Raises IntegrityError if the upload changed after its manifest was admitted.
    """
    uri = converted_uri(upload.uri)
    folder = platform.work_dir / "converted" / content_sha256(upload.uri)[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")), translating_full_disk_errors(folder.parent):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            manifest = convert(upload.uri, platform.store, folder)
            if manifest != admitted:
                raise changed(upload.uri, [Manifest.FILE_NAME])
            family, version, parent = _claimed(upload, manifest)
            published = publish(
                folder, uri, family=family, version=version, parent=parent, store=platform.store
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return uri, published


def _claimed(upload: Upload, manifest: Manifest | None) -> tuple[str, str, str | None]:
    registered = upload.registered
    if registered is None:
        if manifest is None:
            raise UploadError(
                f"{upload.uri} is not a complete upload",
                expected=f"{Manifest.FILE_NAME}, written last",
                found="no such file",
                do="upload it with `trans-peft publish`, or register the version in MLflow",
            )
        return manifest.family, manifest.version, manifest.parent
    if manifest is not None and manifest.family != registered.family:
        raise UploadError(
            f"{registered} points at files of another family",
            expected=registered.family,
            found=f"{manifest.family} (in the manifest at {upload.uri})",
            do="register the version under the family that its manifest names",
        )
    if manifest is None:
        return registered.family, registered.version, registered.parent
    return registered.family, manifest.version, registered.parent or manifest.parent


def _is_refusal_recorded(upload: Upload, platform: Platform) -> bool:
    try:
        return _refusal_file(upload, platform).exists()
    except Exception:  # reported by `ingest`; other uploads are not affected
        return False


def _refusal_file(upload: Upload, platform: Platform) -> Path:
    """Return the file that records the refusal of exactly these files of an upload."""
    try:
        files = [[file.name, file.etag] for file in platform.store.list(upload.uri)]
    except (NotFoundError, InvalidSpecError):  # the bucket or the URI scheme does not exist
        files = []
    number = upload.registered.number if upload.registered else None
    name = content_sha256([upload.uri, files, number, platform.owners, _keys(platform)])[:16]
    return platform.work_dir / "refused" / f"{name}.json"


def _keys(platform: Platform) -> list[str]:
    """Return the public keys of all families. A changed key invalidates recorded refusals."""
    keys = []
    for _, rule in sorted(platform.owners.families.items()):
        try:
            keys.append(Path(rule.key).read_text() if rule.key else "")
        except (OSError, ValueError):
            keys.append("unreadable")
    return keys


def _record_refusal(record: Path, upload: Upload, why: str) -> None:
    with suppress(OSError):  # on a full disk, the next run reads the upload again
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"upload": str(upload), "uri": upload.uri, "why": why}))
