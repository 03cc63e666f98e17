"""Is this prefix a base that may be used? Every reason against it, from one pass over its bytes.

With a manifest, every name, size and sha256 is compared. Without one (somebody registered a version
straight in MLflow), the files must make one whole model; what nobody stated cannot be compared.
Either way the fingerprint comes from the bytes that were checked.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from trans_peft.artifacts import child_uri
from trans_peft.bases.checkpoint import Checkpoint
from trans_peft.bases.filename_checks import filename_problem
from trans_peft.bases.fingerprint import ByteProgress, reader, scan
from trans_peft.bases.manifest import MAX_MANIFEST_BYTES, parse_manifest
from trans_peft.bases.signatures import SIGNATURE_NAME
from trans_peft.domain.base import Fingerprint, Manifest, ManifestFile
from trans_peft.domain.bounds import MAX_FILES
from trans_peft.errors import IntegrityError, NotFoundError, UploadError, listed
from trans_peft.ports import ArtifactStore, StoredFile

__all__ = [
    "BESIDE_THE_FILES",
    "ManifestClaim",
    "VerifiedUpload",
    "changed",
    "content_problems",
    "read_manifest",
    "read_manifest_claim",
    "verify",
]


BESIDE_THE_FILES = frozenset({Manifest.FILE_NAME, SIGNATURE_NAME})
"""What a manifest does not list: itself and its signature. Neither is a file of the base."""


@dataclass(frozen=True)
class VerifiedUpload:
    """An upload that nothing speaks against. `manifest` is None where there was none."""

    manifest: Manifest | None
    fingerprint: Fingerprint
    checkpoint: Checkpoint

    @property
    def verified(self) -> Literal["manifest", "structure"]:
        """What the files were checked against: what they claim to be, or only one another."""
        return "manifest" if self.manifest else "structure"


@dataclass(frozen=True)
class ManifestClaim:
    """What a listing tells about an upload before any file but the manifest is read.

    `unfinished`: files of the manifest that are not there yet, or not in their size. `against`:
    what no further file would mend.
    """

    manifest: Manifest | None
    unfinished: tuple[str, ...] = ()
    against: tuple[str, ...] = ()


def verify(
    uri: str, store: ArtifactStore, *, on_progress: ByteProgress | None = None
) -> VerifiedUpload:
    """Check an upload while reading each of its files once.

    As long as files of the manifest are missing or have other sizes, nothing else is read: they may
    be on their way. Raises NotFoundError where there is nothing, UploadError with all reasons for
    which it is refused; and, which says nothing about the upload, IntegrityError if it changes
    while it is being read, StoreError where the store cannot be read.
    """
    there = store.list(uri)
    if not there:
        raise NotFoundError(f"there are no files below {uri}")
    if len(there) > MAX_FILES:
        raise _refused(
            f"the upload {uri} is refused:", [f"{len(there)} files; at most {MAX_FILES} are read"]
        )
    refusals = {file.name: filename_problem(file.name) for file in there}
    claim = read_manifest_claim(uri, store, there)
    problems = [*filter(None, refusals.values()), *_in_each_others_way(there), *claim.against]
    if claim.unfinished:
        raise _refused(f"the upload {uri} is not complete:", [*claim.unfinished, *problems])
    readable = [f for f in there if not refusals[f.name] and f.name not in BESIDE_THE_FILES]
    found = scan(readable, reader(uri, store), on_progress=on_progress)
    if found.changed or store.list(uri) != there:
        raise changed(uri, found.changed)
    problems += [*found.problems, *content_problems(claim.manifest, found.files)]
    if problems or found.fingerprint is None or found.checkpoint is None:
        raise _refused(f"the upload {uri} is refused:", problems)
    return VerifiedUpload(claim.manifest, found.fingerprint, found.checkpoint)


def changed(uri: str, names: Sequence[str] = ()) -> IntegrityError:
    """Return the error about files that were written, or removed, while somebody read them."""
    return IntegrityError(
        f"the upload {uri} changed while it was being read",
        found=f"another version of {listed(names)}" if names else "other files than at the start",
        do="finish the upload; the next reconcile reads it again",
    )


def read_manifest_claim(
    uri: str, store: ArtifactStore, there: tuple[StoredFile, ...]
) -> ManifestClaim:
    """Return what the manifest among the listed files states. IntegrityError if it changes."""
    try:
        manifest = read_manifest(uri, store, there)
    except UploadError as error:
        return ManifestClaim(None, against=(f"{Manifest.FILE_NAME}: not one of ours: {error}",))
    except (IntegrityError, NotFoundError) as error:
        raise changed(uri, [Manifest.FILE_NAME]) from error
    return _compared(manifest, there) if manifest else ManifestClaim(None)


def read_manifest(uri: str, store: ArtifactStore, there: tuple[StoredFile, ...]) -> Manifest | None:
    """Return the manifest among the listed files, None without one; a huge one is never read.

    Raises UploadError if it is none of ours, IntegrityError or NotFoundError if it changed.
    """
    file = next((file for file in there if file.name == Manifest.FILE_NAME), None)
    if file is None:
        return None
    if file.size > MAX_MANIFEST_BYTES:
        raise UploadError(f"it has {file.size} bytes; at most {MAX_MANIFEST_BYTES} are read")
    with store.read(child_uri(uri, file.name), etag=file.etag) as chunks:
        return parse_manifest(b"".join(chunks))


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


def _compared(manifest: Manifest, there: tuple[StoredFile, ...]) -> ManifestClaim:
    stated = {file.name: file for file in manifest.files}
    found = {file.name: file for file in there if file.name not in BESIDE_THE_FILES}
    missing = sorted(stated.keys() - found.keys())
    return ManifestClaim(
        manifest,
        unfinished=(
            *(f"{name}: missing, the manifest lists it" for name in missing),
            *(
                f"{name}: {found[name].size} bytes, the manifest says {stated[name].size}"
                for name in sorted(stated.keys() & found.keys())
                if found[name].size != stated[name].size
            ),
        ),
        against=(
            *(reason for name in missing if (reason := filename_problem(name))),
            *(f"{name}: not in the manifest" for name in sorted(found.keys() - stated.keys())),
        ),
    )


def _in_each_others_way(there: tuple[StoredFile, ...]) -> list[str]:
    names = {file.name for file in there}
    folders = {str(folder) for name in names for folder in PurePosixPath(name).parents}
    return [f"{name}: a file and a folder at once" for name in sorted(names & folders)]


def _refused(headline: str, problems: Sequence[str]) -> UploadError:
    return UploadError("\n  - ".join([headline, *problems]))
