"""From an upload, or a version that somebody registered, to a base version that is ready.

An upload in InternLM2's layout comes with code that is never run: its Llama form is published
beside it, and that is what becomes the base version.
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
from trans_peft.ports import Platform, StoredFile

__all__ = ["ingest", "pending"]


def ingest(upload: Upload, platform: Platform) -> BaseVersion:
    """Verify an upload (every byte against its manifest), fingerprint it and make it ready.

    Its files must fill the model that loads them, exactly (`bases.model_check`).

    The same upload again returns the version that is there. Raises UploadError with every reason
    for which it is refused (InvalidSpecError where the catalog will not have its family or URI):
    nothing is made ready then, and `pending` leaves it out until a file of it changes. Among the
    reasons: the family takes no versions from there, or has a key and the signature is not right.
    IntegrityError if it changes while it is read: the next `pending` has it again.
    The version of an InternLM2 upload has another URI, that of its Llama form.
    """
    uri, source = upload.uri, "registered" if upload.registered else "upload"
    memo = _memo(upload, platform)  # of what lies there now, whatever comes while it is read
    try:
        expected = _admitted(upload, platform)
        if needs_conversion(uri, platform.store):
            uri, expected = _publish_converted(upload, expected, platform)
            source += f", converted from {upload.uri}"
        verified = verify(uri, platform.store)
        if verified.manifest != expected:  # another one than was admitted
            raise changed(uri, [Manifest.FILE_NAME])
        check_checkpoint(verified.checkpoint, f"the upload {uri}")
        family, version, parent = _claimed(upload, verified.manifest)
        claimed_sha256 = verified.manifest.sha256 if verified.manifest else ""
        ready = platform.catalog.make_ready(
            family,
            version,
            uri,
            fingerprint=verified.fingerprint,
            parent=parent,
            source=f"{source}, {verified.verified}",
            number=upload.registered.number if upload.registered else None,
            manifest_sha256=claimed_sha256,
        )
    except (UploadError, NotFoundError, InvalidSpecError) as refusal:
        _remember(memo, upload, str(refusal))
        raise
    if ready.manifest_sha256 != claimed_sha256:
        _remember(memo, upload, f"{ready} has the same content, from {ready.uri}")
    return ready


def pending(platform: Platform, *, root_uri: str = "") -> tuple[Upload, ...]:
    """Return what could become ready: complete uploads below `root_uri`, registered versions.

    An upload is left out while its manifest claims what a ready version was verified against. What
    was refused is left out until a file of it changes: reading it again, whole, would end the same
    way. One that cannot be asked for is in: `ingest` tells why.
    """
    versions = _known(platform)
    root = root_uri.rstrip("/")
    manifests = {
        child_uri(root, file.name).removesuffix(f"/{Manifest.FILE_NAME}"): file
        for file in (platform.store.list(root) if root else ())
        if f"/{file.name}".endswith(f"/{Manifest.FILE_NAME}")
    }
    registered = [Upload(base.uri, registered=base) for base in versions if not base.ready]
    ours = {converted_uri(uri) for uri in (*manifests, *(item.uri for item in registered))}
    uploaded = [
        Upload(uri)
        for uri, file in manifests.items()
        if uri not in ours and not _is_settled(uri, file, versions, platform)
    ]
    return tuple(
        item
        for item in (*uploaded, *registered)
        if item.uri not in ours and not _is_remembered(item, platform)
    )


def _known(platform: Platform) -> list[BaseVersion]:
    """Return every version of every family. One that cannot be read stops no other."""
    versions: list[BaseVersion] = []
    for family in platform.catalog.families():
        try:
            versions += platform.catalog.versions(family)
        except StoreError:
            raise  # the catalog does not answer: that says nothing about the family
        except TransPeftError:  # its own look says why; or it was deleted a moment ago
            continue
    return versions


def _is_settled(
    uri: str, manifest: StoredFile, versions: Sequence[BaseVersion], platform: Platform
) -> bool:
    """Whether an upload is, or brought along, a version that the catalog knows."""
    known = {base.uri.rstrip("/"): base for base in versions}
    if converted_uri(uri) in known or (uri in known and not known[uri].manifest_sha256):
        return True
    try:
        there = (replace(manifest, name=Manifest.FILE_NAME),)
        claimed = read_manifest(uri, platform.store, there)
    except Exception:  # one item stops no other; `ingest` raises the error again and reports it
        return False
    return claimed is not None and claimed.sha256 in {base.manifest_sha256 for base in versions}


def _admitted(upload: Upload, platform: Platform) -> Manifest | None:
    """Return the manifest of an upload that its family takes from this place, None without one.

    Raises UploadError if it does not, or if the family has a key and the signature is not right.
    Only the manifest and the signature are read.
    """
    uri, store = upload.uri, platform.store
    there = store.list(uri)
    try:
        manifest = read_manifest(uri, store, there)
    except UploadError:
        return None  # `verify` refuses it, with every other reason
    except (IntegrityError, NotFoundError) as error:
        raise changed(uri, [Manifest.FILE_NAME]) from error
    named = upload.registered or manifest
    if named is None:
        return None
    if objection := platform.owners.objection(named.family, uri):
        raise UploadError(
            f"{upload} cannot bring a version of the base family {named.family}: {objection}",
            expected=f"a place below {' or '.join(platform.owners.prefixes(named.family))}",
            found=uri,
            do="upload it there, or let the operator add the place to TRANS_PEFT_FAMILIES",
        )
    if key := platform.owners.key(named.family):
        signed = signed_manifest(uri, store, there, key)
        if signed != manifest:
            raise changed(uri, [Manifest.FILE_NAME])
    return manifest


def _publish_converted(
    upload: Upload, admitted: Manifest | None, platform: Platform
) -> tuple[str, Manifest]:
    """Publish the Llama form of an InternLM2 upload, unless it is there; return URI and manifest.

    Raises IntegrityError if the upload is not the one that was admitted any more.
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
                do="write it with `trans-peft publish`, or register the version in MLflow instead",
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


def _is_remembered(upload: Upload, platform: Platform) -> bool:
    try:
        return _memo(upload, platform).exists()
    except Exception:  # one item stops no other; `ingest` raises the error again and reports it
        return False


def _memo(upload: Upload, platform: Platform) -> Path:
    """Return where it is remembered that these very files need no further look."""
    try:
        files = [[file.name, file.etag] for file in platform.store.list(upload.uri)]
    except (NotFoundError, InvalidSpecError):  # no such bucket, or a URI of no store
        files = []
    number = upload.registered.number if upload.registered else None
    name = content_sha256([upload.uri, files, number, platform.owners, _keys(platform)])[:16]
    return platform.work_dir / "refused" / f"{name}.json"


def _keys(platform: Platform) -> list[str]:
    """Return the public keys of all families: with another key, a refusal is no longer right."""
    keys = []
    for _, rule in sorted(platform.owners.families.items()):
        try:
            keys.append(Path(rule.key).read_text() if rule.key else "")
        except (OSError, ValueError):
            keys.append("unreadable")
    return keys


def _remember(memo: Path, upload: Upload, why: str) -> None:
    with suppress(OSError):  # a full disk: the next look reads the upload once more
        memo.parent.mkdir(parents=True, exist_ok=True)
        memo.write_text(json.dumps({"upload": str(upload), "uri": upload.uri, "why": why}))
