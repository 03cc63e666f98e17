"""Is this prefix a base that may be used? Every reason against it, from one pass over its bytes.

With a manifest, every name, size and sha256 is compared. Without one (somebody registered a version
straight in MLflow), the files must make one whole model; what nobody stated cannot be compared.
Either way the fingerprint comes from the bytes that were checked.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from trans_peft.bases.fingerprint import Progress, reader, scan
from trans_peft.bases.manifest import MAX_MANIFEST_BYTES, parse_manifest
from trans_peft.bases.refusals import refusal
from trans_peft.bases.uris import child_uri
from trans_peft.domain.base import Fingerprint, Manifest, ManifestFile
from trans_peft.errors import IntegrityError, NotFoundError, UploadError
from trans_peft.ports import ArtifactStore, StoredFile

__all__ = ["VerifiedUpload", "content_problems", "read_claim", "verify"]


@dataclass(frozen=True)
class VerifiedUpload:
    """An upload that nothing speaks against. `manifest` is None where there was none."""

    manifest: Manifest | None
    fingerprint: Fingerprint

    @property
    def verified(self) -> Literal["manifest", "structure"]:
        """What the files were checked against: what they claim to be, or only one another."""
        return "manifest" if self.manifest else "structure"


def verify(
    uri: str, store: ArtifactStore, *, on_progress: Progress | None = None
) -> VerifiedUpload:
    """Check an upload while reading each of its files once.

    Raises NotFoundError where there is nothing, UploadError with all reasons for which it is
    refused, StoreError where the store cannot be read (which says nothing about the upload).
    """
    listed = store.list(uri)
    if not listed:
        raise NotFoundError(f"there are no files below {uri}")
    refusals = {file.name: refusal(file.name) for file in listed}
    manifest, problems = read_claim(uri, store, listed)
    problems = [*filter(None, refusals.values()), *problems]
    readable = [f for f in listed if not refusals[f.name] and f.name != Manifest.FILE_NAME]
    found = scan(readable, reader(uri, store), on_progress=on_progress)
    problems += found.problems
    problems += content_problems(manifest, found.files)
    if store.list(uri) != listed:
        problems.append("files were added, changed or removed while the upload was being read")
    if problems or found.fingerprint is None:
        raise UploadError("\n  - ".join([f"the upload {uri} is refused:", *problems]))
    return VerifiedUpload(manifest, found.fingerprint)


def read_claim(
    uri: str, store: ArtifactStore, listed: tuple[StoredFile, ...]
) -> tuple[Manifest | None, list[str]]:
    """Return the manifest there (None without one), and what speaks against it in the listing."""
    try:
        manifest = _manifest(uri, store, listed)
    except (UploadError, IntegrityError) as error:
        return None, [f"{Manifest.FILE_NAME}: not one of ours: {error}"]
    return manifest, _listing_problems(manifest, listed) if manifest else []


def content_problems(manifest: Manifest | None, read: Iterable[ManifestFile]) -> list[str]:
    """Return which of the files that were read are not those of the manifest, if there is one."""
    stated = {file.name: file for file in manifest.files} if manifest else {}
    return [
        f"{file.name}: sha256 {file.sha256}, the manifest says {stated[file.name].sha256}"
        for file in read
        if file.name in stated
        and file.size == stated[file.name].size
        and file.sha256 != stated[file.name].sha256
    ]


def _manifest(uri: str, store: ArtifactStore, listed: tuple[StoredFile, ...]) -> Manifest | None:
    file = next((file for file in listed if file.name == Manifest.FILE_NAME), None)
    if file is None:
        return None
    if file.size > MAX_MANIFEST_BYTES:
        raise UploadError(f"it has {file.size} bytes; at most {MAX_MANIFEST_BYTES} are read")
    with store.read(child_uri(uri, file.name), etag=file.etag) as chunks:
        return parse_manifest(b"".join(chunks))


def _listing_problems(manifest: Manifest, listed: tuple[StoredFile, ...]) -> list[str]:
    stated = {file.name: file for file in manifest.files}
    there = {file.name: file for file in listed if file.name != Manifest.FILE_NAME}
    missing = sorted(stated.keys() - there.keys())
    return [
        *(reason for name in missing if (reason := refusal(name))),
        *(f"{name}: missing, the manifest lists it" for name in missing),
        *(f"{name}: not in the manifest" for name in sorted(there.keys() - stated.keys())),
        *(
            f"{name}: {there[name].size} bytes, the manifest says {stated[name].size}"
            for name in sorted(stated.keys() & there.keys())
            if there[name].size != stated[name].size
        ),
    ]
