"""Write an upload that ingestion will accept: the files first, the manifest last.

Nothing here is needed to publish: any S3 client that writes the same files does as well.
"""

import io
from pathlib import Path

from trans_peft.artifacts import child_uri
from trans_peft.bases.filename_checks import filename_problem
from trans_peft.bases.fingerprint import ByteProgress, folder_file_reader, scan
from trans_peft.bases.manifest import dump_manifest, parse_manifest
from trans_peft.bases.model_check import check_checkpoint
from trans_peft.bases.signatures import SIGNATURE_NAME, sign
from trans_peft.bases.upload import BESIDE_THE_FILES, read_manifest
from trans_peft.domain.base import Manifest
from trans_peft.errors import NotFoundError, UploadError
from trans_peft.ports import ArtifactStore, StoredFile

__all__ = ["publish"]


def publish(
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
    """Upload a Hugging Face folder (hidden files left out) as one version of a base family.

    All is checked before anything is written. An upload that was broken off is taken up again; one
    that is complete and the same is left alone. With `sign_key`, a private key (PEM), the upload is
    signed; one that is complete already gets a new signature. `on_progress` counts each byte
    twice: hashed, sent.
    Raises NotFoundError for an empty folder, UploadError with all that speaks against it; the
    model must load from these files (`model_check`). InvalidSpecError for a key that cannot sign.
    """
    folder = Path(folder)
    files = _files(folder)
    if not files:
        raise NotFoundError(f"there are no files in {folder}", do="give a Hugging Face folder")
    total = sum(file.size for file in files)
    report = on_progress or (lambda done, total: None)

    refusals = {file.name: filename_problem(file.name) for file in files}
    found = scan(
        [file for file in files if not refusals[file.name]],
        folder_file_reader(folder),
        on_progress=lambda done, _: report(done, 2 * total),
    )
    problems = [*filter(None, refusals.values()), *found.problems]
    if problems or found.checkpoint is None:
        raise UploadError("\n  - ".join([f"{folder} cannot be published:", *problems]))
    check_checkpoint(found.checkpoint, str(folder))
    manifest = parse_manifest(dump_manifest(Manifest(family, version, parent, found.files)))

    signature = None if sign_key is None else sign(manifest, sign_key)
    if _is_there(manifest, uri, store):
        report(2 * total, 2 * total)
        if signature is not None:
            _finish(manifest, signature, uri, store)
        return manifest
    sent = total
    for file in manifest.files:
        with (folder / file.name).open("rb") as data:
            store.write(child_uri(uri, file.name), data)
        sent += file.size
        report(sent, 2 * total)
    _finish(manifest, signature, uri, store)
    return manifest


def _finish(manifest: Manifest, signature: bytes | None, uri: str, store: ArtifactStore) -> None:
    """Write the signature, if there is one, and the manifest last."""
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
        if path.name not in BESIDE_THE_FILES
    ]


def _is_there(manifest: Manifest, uri: str, store: ArtifactStore) -> bool:
    """Whether this upload is complete already. UploadError if something else is in its place."""
    there = store.list(uri)
    earlier = read_manifest(uri, store, there)
    if earlier is not None:
        if earlier == manifest:
            return True
        raise UploadError(
            f"there is another upload at {uri}",
            expected=f"{manifest.family}/{manifest.version}, the files of this folder",
            found=f"{earlier.family}/{earlier.version}, {len(earlier.files)} files",
            do="an upload is never overwritten: publish to another prefix",
        )
    ours = {file.name for file in manifest.files} | BESIDE_THE_FILES
    foreign = sorted({file.name for file in there} - ours)
    if foreign:
        raise UploadError(
            f"there are other files at {uri}",
            expected="an empty prefix, or this upload broken off",
            found=", ".join(foreign),
            do="publish to another prefix",
        )
    return False
