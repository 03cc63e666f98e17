"""This worker's verified copies of bases: `<cache>/<digest>/`, a folder that transformers loads.

The name of a copy is the fingerprint of its content, so a copy is never out of date and is shared
by every family and version with the same bytes. It holds the files that the fingerprint covers and
no others: what came into the prefix after it was verified cannot get in here.
"""

import shutil
from pathlib import Path

from filelock import FileLock

from trans_peft.bases.fingerprint import Progress, reader, scan
from trans_peft.bases.model_files import is_felt
from trans_peft.bases.refusals import refusal
from trans_peft.domain.base import Fingerprint
from trans_peft.errors import IntegrityError, NotFoundError
from trans_peft.ports import ArtifactStore

__all__ = ["download"]


def download(
    uri: str,
    store: ArtifactStore,
    cache_dir: Path,
    *,
    fingerprint: Fingerprint,
    on_progress: Progress | None = None,
) -> Path:
    """Return the folder of a base's verified copy, fetching it first where it is not there yet.

    One caller fetches, the others wait for it; a caller that was killed leaves nothing behind that
    is taken for a copy. Raises NotFoundError, StoreError; IntegrityError if the files are no longer
    those of the fingerprint.
    """
    cache_dir = Path(cache_dir)
    target = cache_dir / fingerprint.digest
    if target.is_dir():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f"{fingerprint.digest}.lock"):
        if target.is_dir():
            return target
        part = cache_dir / f"{fingerprint.digest}.part"
        shutil.rmtree(part, ignore_errors=True)
        _fetch(uri, store, part, fingerprint, on_progress)
        part.rename(target)
    return target


def _fetch(
    uri: str,
    store: ArtifactStore,
    folder: Path,
    fingerprint: Fingerprint,
    on_progress: Progress | None,
) -> None:
    files = [file for file in store.list(uri) if is_felt(file.name) and not refusal(file.name)]
    if not files:
        raise NotFoundError(f"there are no model files below {uri}")
    try:
        found = scan(files, reader(uri, store), copy_to=folder, on_progress=on_progress)
        if found.fingerprint is None or found.fingerprint.digest != fingerprint.digest:
            differences = found.problems or _differences(fingerprint, found.fingerprint)
            raise IntegrityError(
                f"the files at {uri} are no longer those that were made ready",
                expected=f"fingerprint {fingerprint.digest}",
                found=f"other files: {'; '.join(differences)}",
                do="restore them, or publish the new ones under a new version",
            )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _differences(expected: Fingerprint, found: Fingerprint | None) -> list[str]:
    if found is None:
        return []
    differing = [
        name
        for name in sorted(expected.tensors.keys() | found.tensors.keys())
        if expected.tensors.get(name) != found.tensors.get(name)
    ]
    parts = (
        "architecture",
        "layer_count",
        "config_sha256",
        "vocabulary_sha256",
        "tokenizer_sha256",
        "chat_template_sha256",
    )
    return [
        *(part for part in parts if getattr(expected, part) != getattr(found, part)),
        *([f"{len(differing)} weights, the first is {differing[0]}"] if differing else []),
    ]
