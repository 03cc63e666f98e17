"""Copies of base models from the Hugging Face hub: `hub:OWNER/NAME[@REVISION]`."""

import re
import shutil
from pathlib import Path

from trans_peft.domain.places import HUB
from trans_peft.errors import InvalidSpecError, NotFoundError, StoreError

__all__ = ["model_folder"]

_PLACE = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""What a base consists of. Weights in other formats and programs are not downloaded."""


def model_folder(uri: str, *, download: bool) -> Path:
    """Return the folder of a model of the hub in the hub's own cache.

    With `download`, files that the cache lacks are downloaded. Raises NotFoundError if the model is
    not there, StoreError if the disk is too small or the hub does not respond, and InvalidSpecError
    for a malformed name.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    match = _PLACE.fullmatch(uri.removeprefix(HUB))
    if match is None:
        raise InvalidSpecError(
            f"{uri} does not name a model of the hub", expected="hub:OWNER/NAME[@REVISION]"
        )
    name, revision = match.groups()

    def snapshot(*, offline: bool) -> Path:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(_FILES), local_files_only=offline
            )
        )

    try:
        folder = snapshot(offline=True)
    except LocalEntryNotFoundError as error:
        if not download:
            raise NotFoundError(f"{uri} is not in the hub's cache on this machine") from error
        folder = None
    if not download and folder is not None:
        return folder
    try:
        if folder is None:
            _check_space(name, revision, Path(constants.HF_HUB_CACHE))
        return snapshot(offline=False)  # completes a download that was interrupted
    except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise StoreError(
            f"the model {uri} cannot be downloaded",
            found=f"{type(error).__name__}: {error}",
            do="check its name, your access to it, and the connection to the hub",
        ) from error


def _check_space(name: str, revision: str | None, cache: Path) -> None:
    from fnmatch import fnmatch

    from huggingface_hub import HfApi

    files = HfApi().model_info(name, revision=revision, files_metadata=True).siblings or []
    needed = sum(
        file.size or 0 for file in files if any(fnmatch(file.rfilename, one) for one in _FILES)
    )
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise StoreError(
            f"the model {name} does not fit on the disk of {cache}",
            expected=f"{needed / 1e9:.1f} GB",
            found=f"{free / 1e9:.1f} GB are free",
            do="free disk space, or set HF_HOME to a folder of another disk",
        )
