"""Verify an upload while reading each of its files once.

With a manifest, all names, sizes and hashes are compared with it. Without one (a version that a
user registered in MLflow), the files must form one complete model. In both cases the fingerprint is
computed from the bytes that were verified.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from trans_peft.artifacts import read_file
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
    "UNLISTED_FILES",
    "ManifestClaim",
    "VerifiedUpload",
    "changed",
    "content_problems",
    "read_manifest",
    "read_manifest_claim",
    "verify",
]


UNLISTED_FILES = frozenset({Manifest.FILE_NAME, SIGNATURE_NAME})
"""Files that a manifest does not list: the manifest and its signature."""


@dataclass(frozen=True)
class VerifiedUpload:
    """The result for a valid upload. `manifest` is None if the upload has none."""

    manifest: Manifest | None
    fingerprint: Fingerprint
    checkpoint: Checkpoint

    @property
    def verified(self) -> Literal["manifest", "structure"]:
        """What the files were compared with: their manifest, or only the structure of a model."""
        return "manifest" if self.manifest else "structure"


@dataclass(frozen=True)
class ManifestClaim:
    """The manifest of an upload, compared with the listing of its files.

    Attributes:
        manifest: None if there is none, or if it is invalid.
        unfinished: files of the manifest that are missing or have another size; they may still be
            uploaded.
        against: problems that uploading further files cannot solve.
    """

    manifest: Manifest | None
    unfinished: tuple[str, ...] = ()
    against: tuple[str, ...] = ()


def verify(
    uri: str, store: ArtifactStore, *, on_progress: ByteProgress | None = None
) -> VerifiedUpload:
    """Verify an upload; return its manifest, fingerprint and checkpoint.

    If files of the manifest are missing or have another size, only the manifest is read. Raises
    NotFoundError if there are no files, UploadError with all reasons why the upload is refused,
    IntegrityError if it changes while it is read, StoreError if the store fails. The last two do
    not mean that the upload is invalid.
    """
    listing = store.list(uri)
    if not listing:
        raise NotFoundError(f"there are no files below {uri}")
    if len(listing) > MAX_FILES:
        raise _upload_error(
            f"the upload {uri} is refused:",
            [f"{len(listing)} files; at most {MAX_FILES} are allowed"],
        )
    name_problems = {file.name: filename_problem(file.name) for file in listing}
    claim = read_manifest_claim(uri, store, listing)
    problems = [*filter(None, name_problems.values()), *_name_collisions(listing), *claim.against]
    if claim.unfinished:
        raise _upload_error(f"the upload {uri} is not complete:", [*claim.unfinished, *problems])
    readable = [f for f in listing if not name_problems[f.name] and f.name not in UNLISTED_FILES]
    found = scan(readable, reader(uri, store), on_progress=on_progress)
    if found.changed or store.list(uri) != listing:
        raise changed(uri, found.changed)
    problems += [*found.problems, *content_problems(claim.manifest, found.files)]
    if problems or found.fingerprint is None or found.checkpoint is None:
        raise _upload_error(f"the upload {uri} is refused:", problems)
    return VerifiedUpload(claim.manifest, found.fingerprint, found.checkpoint)


def changed(uri: str, names: Sequence[str] = ()) -> IntegrityError:
    """Return the error for files that were written or removed while they were being read."""
    return IntegrityError(
        f"the upload {uri} changed while it was being read",
        found=f"a new version of {listed(names)}" if names else "other files than at the start",
        do="complete the upload; the next reconcile reads it again",
    )


def read_manifest_claim(
    uri: str, store: ArtifactStore, listing: tuple[StoredFile, ...]
) -> ManifestClaim:
    """Read the manifest among the listed files, and compare the files with it.

    Raises IntegrityError if the manifest changes meanwhile, StoreError.
    """
    try:
        manifest = read_manifest(uri, store, listing)
    except UploadError as error:
        return ManifestClaim(
            None, against=(f"{Manifest.FILE_NAME}: not a valid manifest: {error}",)
        )
    except (IntegrityError, NotFoundError) as error:
        raise changed(uri, [Manifest.FILE_NAME]) from error
    return _compared(manifest, listing) if manifest else ManifestClaim(None)


def read_manifest(
    uri: str, store: ArtifactStore, listing: tuple[StoredFile, ...]
) -> Manifest | None:
    """Return the manifest among the listed files, or None if there is none.

    Raises UploadError if it is invalid or larger than `MAX_MANIFEST_BYTES`, IntegrityError or
    NotFoundError if it changed.
    """
    file = next((file for file in listing if file.name == Manifest.FILE_NAME), None)
    if file is None:
        return None
    if file.size > MAX_MANIFEST_BYTES:
        raise UploadError(f"it has {file.size} bytes; at most {MAX_MANIFEST_BYTES} are allowed")
    return parse_manifest(read_file(uri, file, store))


def content_problems(manifest: Manifest | None, read: Iterable[ManifestFile]) -> list[str]:
    """Return the files whose sha256 differs from the manifest's; none without a manifest."""
    stated = {file.name: file for file in manifest.files} if manifest else {}
    return [
        f"{file.name}: sha256 {file.sha256}, the manifest lists {stated[file.name].sha256}"
        for file in read
        if file.name in stated
        and file.size == stated[file.name].size
        and file.sha256 != stated[file.name].sha256
    ]


def _compared(manifest: Manifest, listing: tuple[StoredFile, ...]) -> ManifestClaim:
    stated = {file.name: file for file in manifest.files}
    found = {file.name: file for file in listing if file.name not in UNLISTED_FILES}
    missing = sorted(stated.keys() - found.keys())
    return ManifestClaim(
        manifest,
        unfinished=(
            *(f"{name}: missing, but listed in the manifest" for name in missing),
            *(
                f"{name}: {found[name].size} bytes, the manifest lists {stated[name].size}"
                for name in sorted(stated.keys() & found.keys())
                if found[name].size != stated[name].size
            ),
        ),
        against=(
            *(reason for name in missing if (reason := filename_problem(name))),
            *(f"{name}: not in the manifest" for name in sorted(found.keys() - stated.keys())),
        ),
    )


def _name_collisions(listing: tuple[StoredFile, ...]) -> list[str]:
    names = {file.name for file in listing}
    folders = {str(folder) for name in names for folder in PurePosixPath(name).parents}
    return [f"{name}: both a file and a folder" for name in sorted(names & folders)]


def _upload_error(headline: str, problems: Sequence[str]) -> UploadError:
    return UploadError("\n  - ".join([headline, *problems]))
