"""Download the tokenizer of a base without its weights, and compare it with the fingerprint."""

from pathlib import Path

from trans_peft.artifacts import download_files
from trans_peft.bases.cache import model_files
from trans_peft.bases.fingerprint import folder_file_reader
from trans_peft.bases.model_files import MAX_TEXT_BYTES, ModelFiles
from trans_peft.domain.base import Fingerprint
from trans_peft.errors import IntegrityError
from trans_peft.ports import ArtifactStore, StoredFile

__all__ = ["copy_tokenizer"]


def copy_tokenizer(
    uri: str, store: ArtifactStore, folder: Path, *, fingerprint: Fingerprint
) -> Path:
    """Write the tokenizer and the configuration of a base into `folder`, and return `folder`.

    The hashes are computed from the written files. Raises NotFoundError if the store has no such
    files, IntegrityError if the files no longer match the fingerprint.
    """
    texts = [
        file
        for file in model_files(uri, store)
        if not file.name.endswith(".safetensors") and file.size <= MAX_TEXT_BYTES
    ]
    download_files(uri, texts, store, folder)
    found = ModelFiles()
    for file in texts:
        copied = StoredFile(file.name, (folder / file.name).stat().st_size, "")
        with folder_file_reader(folder)(copied) as stream:
            found.take(copied, stream)
    hashes = found.text_hashes()
    differing = [
        name for name, value in (hashes or {}).items() if value != getattr(fingerprint, name)
    ]
    if hashes is None or differing:
        raise IntegrityError(
            f"the tokenizer or the configuration at {uri} changed after the base was made ready",
            expected=f"the files of fingerprint {fingerprint.digest}",
            found="; ".join(found.problems or [f"a different {name}" for name in differing]),
            do="restore them, or publish the new ones under a new version",
        )
    return folder
