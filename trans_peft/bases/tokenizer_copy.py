"""A base's tokenizer without its weights: fetched, and held against the base's fingerprint."""

from pathlib import Path

from trans_peft.bases.cache import model_files
from trans_peft.bases.fingerprint import folder_file_reader
from trans_peft.bases.model_files import MAX_TEXT_BYTES, ModelFiles
from trans_peft.bases.uris import child_uri
from trans_peft.domain.base import Fingerprint
from trans_peft.errors import IntegrityError
from trans_peft.ports import ArtifactStore, StoredFile

__all__ = ["copy_tokenizer"]


def copy_tokenizer(
    uri: str, store: ArtifactStore, folder: Path, *, fingerprint: Fingerprint
) -> Path:
    """Write a base's tokenizer and configuration into `folder` and return it.

    What was written is hashed, not what the store holds at another moment. NotFoundError where the
    files are gone; IntegrityError where they are no longer those of the fingerprint.
    """
    found = ModelFiles()
    for file in model_files(uri, store):
        if file.name.endswith(".safetensors") or file.size > MAX_TEXT_BYTES:
            continue
        target = folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            store.read(child_uri(uri, file.name), etag=file.etag or None) as chunks,
            target.open("wb") as written,
        ):
            written.writelines(chunks)
        copied = StoredFile(file.name, target.stat().st_size, "")
        with folder_file_reader(folder)(copied) as stream:
            found.take(copied, stream)
    hashes = found.text_hashes()
    differing = [
        name for name, value in (hashes or {}).items() if value != getattr(fingerprint, name)
    ]
    if hashes is None or differing:
        raise IntegrityError(
            f"the tokenizer or the configuration at {uri} is no longer what was made ready",
            expected=f"the files of fingerprint {fingerprint.digest}",
            found="; ".join(found.problems or [f"another {name}" for name in differing]),
            do="restore them, or publish the new ones under a new version",
        )
    return folder
