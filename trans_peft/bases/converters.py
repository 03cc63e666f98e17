"""The foreign layouts of checkpoints that ingestion converts. Add a converter to `CONVERTERS`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trans_peft.bases.conversion import Converter, SourceFiles, convert_checkpoint
from trans_peft.bases.fingerprint import ByteProgress
from trans_peft.bases.internlm2.convert import InternLM2Converter
from trans_peft.domain.base import Manifest
from trans_peft.domain.conventions import CONVERTED_SUFFIX
from trans_peft.errors import IntegrityError, NotFoundError, UploadError
from trans_peft.ports import ArtifactStore

__all__ = ["CONVERTERS", "convert", "converted_uri", "needs_conversion"]

CONVERTERS: tuple[Converter, ...] = (InternLM2Converter(),)


def converted_uri(uri: str) -> str:
    """Return the URI of the converted form of the upload at `uri`, a prefix beside it."""
    return f"{uri.rstrip('/')}{CONVERTED_SUFFIX}"


def needs_conversion(uri: str, store: ArtifactStore) -> bool:
    """Whether the files at a path or URI have one of the layouts in `CONVERTERS`.

    False if config.json cannot be read: verification then reports why.
    """
    try:
        return _converter(_config(uri, store)) is not None
    except (NotFoundError, UploadError, IntegrityError):
        return False


def convert(
    uri: str, store: ArtifactStore, folder: Path, *, on_progress: ByteProgress | None = None
) -> Manifest | None:
    """Write the converted form of the files at `uri` into a new folder, atomically.

    See `convert_checkpoint` for the result and the errors. Raises UploadError also for files in
    none of the known layouts.
    """
    config = _config(uri, store)
    converter = _converter(config)
    if converter is None:
        raise UploadError(
            f"{uri} is not in a layout that is converted",
            expected=f"config.json of {' or '.join(known.name for known in CONVERTERS)}",
            found=f"model_type {config.get('model_type')}",
            do="use the files as they are",
        )
    return convert_checkpoint(uri, store, folder, converter, on_progress=on_progress)


def _config(uri: str, store: ArtifactStore) -> dict[str, Any]:
    return SourceFiles.at(uri, store).json("config.json")


def _converter(config: Mapping[str, Any]) -> Converter | None:
    return next((known for known in CONVERTERS if known.needs(config)), None)
