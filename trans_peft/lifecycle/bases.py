"""From an upload, or a version that somebody registered, to a base version that is ready.

An upload in InternLM2's layout comes with code that is never run: its Llama form is published
beside it, and that is what becomes the base version.
"""

import json
import shutil
from pathlib import Path

from filelock import FileLock

from trans_peft.bases.convert import convert, converted_uri, needs_conversion
from trans_peft.bases.publish import publish
from trans_peft.bases.upload import verify
from trans_peft.domain.base import BaseVersion, Manifest, Upload
from trans_peft.domain.identity import content_sha256
from trans_peft.errors import NotFoundError, UploadError
from trans_peft.ports import Platform

__all__ = ["ingest", "pending"]


def ingest(upload: Upload, platform: Platform) -> BaseVersion:
    """Verify an upload (every byte against its manifest), fingerprint it and make it ready.

    The same upload again returns the version that is there. Raises UploadError with every reason
    for which it is refused: nothing is made ready then, and `pending` leaves it out from now on.
    The version of an InternLM2 upload has another URI, that of its Llama form.
    """
    uri, source = upload.uri, "registered" if upload.registered else "upload"
    try:
        if needs_conversion(uri, platform.store):
            uri = _publish_converted(upload, platform)
            source += f", converted from {upload.uri}"
        verified = verify(uri, platform.store)
        family, version, parent = _claimed(upload, verified.manifest)
        return platform.catalog.make_ready(
            family,
            version,
            uri,
            fingerprint=verified.fingerprint,
            parent=parent,
            source=f"{source}, {verified.verified}",
            number=upload.registered.number if upload.registered else None,
        )
    except (UploadError, NotFoundError) as refusal:
        _remember(upload, refusal, platform)
        raise


def pending(platform: Platform, *, root_uri: str = "") -> tuple[Upload, ...]:
    """Return what could become ready: complete uploads below `root_uri`, registered versions.

    What was refused is left out until a file of it changes: reading it again, whole, would end the
    same way.
    """
    versions = [
        base for family in platform.catalog.families() for base in platform.catalog.versions(family)
    ]
    known = {base.uri.rstrip("/") for base in versions}
    root = root_uri.rstrip("/")
    uploaded = [
        Upload(f"{root}/{file.name}".removesuffix(f"/{Manifest.FILE_NAME}"))
        for file in (platform.store.list(root) if root else ())
        if f"/{file.name}".endswith(f"/{Manifest.FILE_NAME}")
    ]
    registered = [Upload(base.uri, registered=base) for base in versions if not base.ready]
    fresh = [
        upload for upload in uploaded if known.isdisjoint((upload.uri, converted_uri(upload.uri)))
    ]
    candidates = fresh + registered
    ours = {converted_uri(item.uri) for item in candidates}  # their uploads bring them along
    return tuple(
        item
        for item in candidates
        if item.uri not in ours and not _refusal(item, platform).exists()
    )


def _publish_converted(upload: Upload, platform: Platform) -> str:
    """Publish the Llama form of an InternLM2 upload, unless it is there, and return its URI."""
    uri = converted_uri(upload.uri)
    folder = platform.work_dir / "converted" / content_sha256(upload.uri)[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            manifest = convert(upload.uri, platform.store, folder)
            family, version, parent = _claimed(upload, manifest)
            publish(
                folder, uri, family=family, version=version, parent=parent, store=platform.store
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return uri


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


def _remember(upload: Upload, refusal: Exception, platform: Platform) -> None:
    path = _refusal(upload, platform)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"upload": str(upload), "uri": upload.uri, "why": str(refusal)}))


def _refusal(upload: Upload, platform: Platform) -> Path:
    try:
        files = [[file.name, file.etag] for file in platform.store.list(upload.uri)]
    except NotFoundError:  # a bucket that is not there
        files = []
    number = upload.registered.number if upload.registered else None
    name = content_sha256([upload.uri, files, number])[:16]
    return platform.work_dir / "refused" / f"{name}.json"
