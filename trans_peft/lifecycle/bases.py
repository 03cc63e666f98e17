"""From an upload, or a version that somebody registered, to a base version that is ready."""

import json
from dataclasses import dataclass

from trans_peft.bases.upload import verify
from trans_peft.domain.base import BaseVersion, Manifest
from trans_peft.domain.identity import content_sha256
from trans_peft.errors import NotFoundError, UploadError
from trans_peft.ports import Platform

__all__ = ["Pending", "find_base", "ingest", "ingest_registered", "pending_uploads"]


@dataclass(frozen=True)
class Pending:
    """A complete upload that no ready version stands for: its prefix and its manifest's ETag."""

    uri: str
    etag: str


def find_base(family: str, version: str, platform: Platform) -> BaseVersion:
    """Return the ready base version with that label or alias (`serving`, `champion`).

    Raises NotFoundError, listing what there is, also where the version exists but is not ready.
    """
    versions = platform.catalog.versions(family)
    number = platform.catalog.alias(family, version)
    for base in versions:
        if base.ready and (base.number == number if number is not None else base.version == version):
            return base
    raise NotFoundError(
        f"family {family!r} has no ready base version {version!r}",
        expected=", ".join(base.version for base in versions if base.ready) or "none is ready yet",
        found=", ".join(f"{base.version} (not ready)" for base in versions if not base.ready)
        or repr(version),
        do="ingest the base first, or set the alias on a version that is ready",
    )


def ingest(uri: str, platform: Platform) -> BaseVersion:
    """Verify an upload (every byte against its manifest), fingerprint it and make it ready.

    The same upload again returns the version that is there. Raises UploadError with every reason
    for which it is refused; then nothing is registered.
    """
    upload = verify(uri, platform.store)
    if upload.manifest is None:
        raise UploadError(
            f"{uri} is not a complete upload",
            expected=f"{Manifest.FILE_NAME}, written last",
            found="no such file",
            do="write it with `trans-peft publish`, or register the version in MLflow instead",
        )
    return platform.catalog.make_ready(
        upload.manifest.family,
        upload.manifest.version,
        uri,
        fingerprint=upload.fingerprint,
        parent=upload.manifest.parent,
        source="upload",
    )


def ingest_registered(base: BaseVersion, platform: Platform) -> BaseVersion:
    """Verify and fingerprint a version that another client registered, and make it ready.

    Where the files come with a manifest, it must agree with what was registered. Raises UploadError.
    """
    upload = verify(base.uri, platform.store)
    parent = base.parent
    if upload.manifest is not None:
        claimed = upload.manifest.family
        if claimed != base.family:
            raise UploadError(
                f"{base} points at files of another family",
                expected=base.family,
                found=f"{claimed} (in the manifest at {base.uri})",
                do="register the version under the family that its manifest names",
            )
        parent = parent or upload.manifest.parent
    return platform.catalog.make_ready(
        base.family,
        base.version,
        base.uri,
        fingerprint=upload.fingerprint,
        parent=parent,
        source="registered",
        number=base.number,
    )


def pending_uploads(root_uri: str, platform: Platform) -> tuple[Pending, ...]:
    """Return the complete uploads below `root_uri` that no ready version stands for.

    An upload refused before is left out until its manifest changes: reading it again, whole, would
    end the same way.
    """
    root = root_uri.rstrip("/")
    known = {
        base.uri.rstrip("/")
        for family in platform.catalog.families()
        for base in platform.catalog.versions(family)
        if base.ready
    }
    found = (
        Pending(f"{root}/{file.name.removesuffix(Manifest.FILE_NAME)}".rstrip("/"), file.etag)
        for file in platform.store.list(root)
        if file.name.endswith(f"/{Manifest.FILE_NAME}") or file.name == Manifest.FILE_NAME
    )
    return tuple(
        upload for upload in found if upload.uri not in known and not _refusal(upload, platform)
    )


def refuse(upload: Pending, reason: str, platform: Platform) -> None:
    """Remember that an upload was refused, so that the schedule does not read it for ever."""
    path = _refusal_path(upload, platform)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"uri": upload.uri, "etag": upload.etag, "reason": reason}))


def _refusal(upload: Pending, platform: Platform) -> bool:
    return _refusal_path(upload, platform).exists()


def _refusal_path(upload: Pending, platform: Platform):
    return platform.work_dir / "refused" / f"{content_sha256([upload.uri, upload.etag])[:16]}.json"
