"""Upload a base: the files first, the manifest last.

Any S3 client that writes the same files can publish, too.
"""

import io
from pathlib import Path

from trans_peft.artifacts import child_uri
from trans_peft.bases.filename_checks import filename_problem
from trans_peft.bases.fingerprint import ByteProgress, folder_file_reader, scan
from trans_peft.bases.manifest import dump_manifest, parse_manifest
from trans_peft.bases.model_check import check_checkpoint
from trans_peft.bases.signatures import SIGNATURE_NAME, sign
from trans_peft.bases.upload import UNLISTED_FILES, read_manifest
from trans_peft.domain.base import Manifest
from trans_peft.errors import NotFoundError, UploadError, listed
from trans_peft.ports import ArtifactStore, StoredFile

__all__ = ["publish"]


def publish(  # noqa: PLR0913  the fields of the manifest are named
    folder: Path,
    uri: str,
    *,
    family: str,
    version: str,
    parent: str | None = None,
    store: ArtifactStore,
    sign_key: Path | None = None,
    on_progress: ByteProgress | None = None,
) -> Manifest:
    """Upload a Hugging Face folder, without hidden files, as one version of a base family.

    The files are checked before any is written; the model must load from them (`model_check`). An
    interrupted upload is completed, and a complete one stays unchanged. `sign_key` is a private key
    (PEM) to sign the upload with; a complete upload then gets a new signature. `on_progress` counts
    each byte twice: when it is hashed, and when it is sent.

    Raises NotFoundError for an empty folder, UploadError with all reasons why the files are
    refused, InvalidSpecError for a key that cannot sign.
    """
    folder = Path(folder)
    files = _files(folder)
    if not files:
        raise NotFoundError(f"there are no files in {folder}", do="name a Hugging Face folder")
    total = sum(file.size for file in files)
    report = on_progress or (lambda done, total: None)

    name_problems = {file.name: filename_problem(file.name) for file in files}
    found = scan(
        [file for file in files if not name_problems[file.name]],
        folder_file_reader(folder),
        on_progress=lambda done, _: report(done, 2 * total),
    )
    problems = [*filter(None, name_problems.values()), *found.problems]
    if problems or found.checkpoint is None:
        raise UploadError("\n  - ".join([f"{folder} cannot be published:", *problems]))
    check_checkpoint(found.checkpoint, str(folder))
    manifest = parse_manifest(dump_manifest(Manifest(family, version, parent, found.files)))

    signature = None if sign_key is None else sign(manifest, sign_key)
    if _is_complete(manifest, uri, store):
        report(2 * total, 2 * total)
        if signature is not None:
            _write_manifest(manifest, signature, uri, store)
        return manifest
    sent = total
    for file in manifest.files:
        with (folder / file.name).open("rb") as data:
            store.write(child_uri(uri, file.name), data)
        sent += file.size
        report(sent, 2 * total)
    _write_manifest(manifest, signature, uri, store)
    return manifest


def _write_manifest(
    manifest: Manifest, signature: bytes | None, uri: str, store: ArtifactStore
) -> None:
    """Write the signature, if there is one, and then the manifest."""
    if signature is not None:
        store.write(child_uri(uri, SIGNATURE_NAME), io.BytesIO(signature))
    store.write(child_uri(uri, Manifest.FILE_NAME), io.BytesIO(dump_manifest(manifest)))


def _files(folder: Path) -> list[StoredFile]:
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    ]
    return [
        StoredFile(path.relative_to(folder).as_posix(), path.stat().st_size, "")
        for path in paths
        if path.name not in UNLISTED_FILES
    ]


def _is_complete(manifest: Manifest, uri: str, store: ArtifactStore) -> bool:
    """Whether this upload is complete. Raises UploadError if other files are at its URI."""
    listed_files = store.list(uri)
    earlier = read_manifest(uri, store, listed_files)
    if earlier is not None:
        if earlier == manifest:
            return True
        raise UploadError(
            f"there is another upload at {uri}",
            expected=f"{manifest.family}/{manifest.version}, the files of this folder",
            found=f"{earlier.family}/{earlier.version}, {len(earlier.files)} files",
            do="publish to another prefix; an upload is never overwritten",
        )
    expected = {file.name for file in manifest.files} | UNLISTED_FILES
    foreign = sorted({file.name for file in listed_files} - expected)
    if foreign:
        raise UploadError(
            f"there are other files at {uri}",
            expected="an empty prefix, or an interrupted upload of this folder",
            found=listed(foreign),
            do="publish to another prefix",
        )
    return False
