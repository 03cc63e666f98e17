"""Files of a base version on this worker: verified copies, tokenizers, fingerprints."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trans_peft.bases.cache import download
from trans_peft.bases.model_names import in_model_names
from trans_peft.bases.tokenizer_copy import copy_tokenizer
from trans_peft.domain.base import BaseVersion, Fingerprint
from trans_peft.errors import BaseUnreadableError, IsolationError, StoreError, TransPeftError
from trans_peft.ports import Platform

__all__ = ["base_folder", "named_fingerprint", "reading_base", "tokenizer_folder"]


@contextmanager
def reading_base(name: object) -> Iterator[None]:
    """Raise BaseUnreadableError for an error of the block, which reads files of a base.

    Every adapter on the base gets the same error. It must not count as a failed attempt of each
    adapter, or all of them would stay parked after the base is repaired.
    """
    try:
        yield
    except (StoreError, IsolationError):
        raise
    except TransPeftError as error:
        raise BaseUnreadableError(f"the base {name} cannot be read: {error}") from error


def base_folder(base: BaseVersion, platform: Platform) -> Path:
    """Return the folder with this worker's verified copy of a base; download it if missing."""
    with reading_base(base):
        return download(
            base.uri,
            platform.store,
            platform.work_dir / "bases",
            fingerprint=platform.catalog.fingerprint(base),
            limit_bytes=platform.cache_bytes,
            on_found=platform.on_base_copy,
        )


def named_fingerprint(base: BaseVersion, platform: Platform) -> Fingerprint:
    """Return a base's fingerprint with the tensor names that the loaded model uses."""
    with reading_base(base):
        return in_model_names(
            platform.catalog.fingerprint(base),
            base.uri,
            platform.store,
            platform.work_dir / "model-names",
        )


def tokenizer_folder(base: BaseVersion, platform: Platform, folder: Path) -> Path:
    """Write a base's tokenizer into `folder` and return `folder`. No weights are downloaded.

    Raises BaseUnreadableError if the files differ from those that ingestion verified.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with reading_base(base):
        fingerprint = platform.catalog.fingerprint(base)
        return copy_tokenizer(base.uri, platform.store, folder, fingerprint=fingerprint)
