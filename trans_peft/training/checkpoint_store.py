"""Checkpoints of one training run in the artifact store, for a run that continues on another host.

    <prefix>/checkpoint-20/<file>     the files of a checkpoint
    <prefix>/checkpoint-20.json       their SHA-256, written last: without it the checkpoint is
                                      incomplete

The prefix belongs to one training job (`TrainingJob.identity`), so a checkpoint is never that of
other data or of another recipe. The two newest checkpoints are kept, as on the disk.
"""

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from trans_peft.artifacts import child_uri
from trans_peft.errors import IntegrityError, StoreError, TransPeftError, map_exceptions
from trans_peft.ports import ArtifactStore
from trans_peft.training.events import CheckpointSaved, Event, LogLine
from trans_peft.training.job import TrainingJob

__all__ = ["CheckpointStore", "continued"]

_KEPT = 2
_COMPLETE = "complete"  # `trans_peft.training.trainer` writes it last, with the other files' names
_FOLDER = re.compile(r"checkpoint-(\d{1,9})")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")


def continued(
    job: TrainingJob, checkpoints: "CheckpointStore | None", on_event: Callable[[Event], None]
) -> Callable[[Event], None]:
    """Prepare `fit` to resume from the newest checkpoint of this host or of the artifact store.

    Returns the callback to pass to `fit`. It calls `on_event`, and copies each complete checkpoint
    to the artifact store. A copy that fails is reported as a line of the log; training goes on. A
    checkpoint that training deletes at its end is not copied. Without a store it is `on_event`.
    Raises what `TrainingJob.check` raises, and StoreError if the stored checkpoints cannot be read.
    """
    if checkpoints is None:
        return on_event
    job.check()
    if not job.result_file.is_file():
        _restore(checkpoints, job.checkpoint_folder, on_event)

    def copying(event: Event) -> None:
        on_event(event)
        if isinstance(event, CheckpointSaved):
            try:
                checkpoints.upload(job.checkpoint_folder / f"checkpoint-{event.step}")
            except TransPeftError as error:
                if job.result_file.is_file():
                    return
                on_event(LogLine(f"the checkpoint after step {event.step} was not copied: {error}"))

    return copying


def _restore(
    checkpoints: "CheckpointStore", folder: Path, on_event: Callable[[Event], None]
) -> None:
    """Download the newest intact checkpoint, unless this host has the same one or a newer one."""
    here = max((_step(mark.parent.name) for mark in folder.glob(f"*/{_COMPLETE}")), default=0)
    for step in checkpoints.steps():
        if step <= here:
            return
        try:
            checkpoints.download(step, folder)
        except IntegrityError as error:  # an older one, or the first step, gives the same weights
            on_event(LogLine(f"the stored checkpoint after step {step} is not used: {error}"))
        else:
            on_event(LogLine(f"the checkpoint after step {step} comes from the artifact store"))
            return


class CheckpointStore:
    """The checkpoints of one training job below `prefix_uri`."""

    def __init__(self, store: ArtifactStore, prefix_uri: str) -> None:
        self._store = store
        self._prefix_uri = prefix_uri

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, newest first. Raises StoreError."""
        names = (file.name for file in self._store.list(self._prefix_uri))
        found = {_step(name.removesuffix(".json")) for name in names if name.endswith(".json")}
        return sorted(found - {0}, reverse=True)

    def upload(self, checkpoint: Path) -> None:
        """Copy a complete checkpoint, and remove all but the two newest. Raises StoreError."""
        # Training deletes old checkpoints meanwhile, and all of them at its end. Links outside of
        # its folder keep the files.
        staged = checkpoint.parent.with_suffix(".upload")
        try:
            with _disk_errors(checkpoint):
                shutil.rmtree(staged, ignore_errors=True)
                shutil.copytree(checkpoint, staged, copy_function=os.link)
                for name in (staged / _COMPLETE).read_text().splitlines():
                    (staged / name).stat()  # raises if it was deleted before the links were made
                hashes = {}
                for path in sorted(staged.iterdir()):
                    with path.open("rb") as file:
                        hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
                        file.seek(0)
                        self._store.write(self._uri(checkpoint.name, path.name), file)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        manifest = json.dumps(hashes, indent=2).encode()
        self._store.write(self._uri(f"{checkpoint.name}.json"), io.BytesIO(manifest))
        for step in self.steps()[_KEPT:]:
            self._remove(step)

    def download(self, step: int, folder: Path) -> None:
        """Write a checkpoint into `folder`. IntegrityError if a file is missing or changed."""
        name = f"checkpoint-{step}"
        hashes = _hashes(self._read(f"{name}.json"))
        with _disk_errors(folder):
            partial = folder / f"{name}.download"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            try:
                for file_name, sha256 in hashes.items():
                    self._fetch(self._uri(name, file_name), partial / file_name, sha256)
                shutil.rmtree(folder / name, ignore_errors=True)
                partial.rename(folder / name)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def clear(self) -> None:
        """Remove all checkpoints. Raises StoreError."""
        for step in self.steps():
            self._remove(step)
        for file in self._store.list(self._prefix_uri):
            self._store.remove(self._uri(file.name))

    def _fetch(self, uri: str, path: Path, sha256: str) -> None:
        digest = hashlib.sha256()
        try:
            with self._store.read(uri) as chunks, path.open("wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
        except LookupError as error:
            raise IntegrityError(f"{uri} is missing", do="nothing: it is not used") from error
        if digest.hexdigest() != sha256:
            raise IntegrityError(f"{uri} changed", expected=sha256, found=digest.hexdigest())

    def _read(self, name: str) -> bytes:
        with self._store.read(self._uri(name)) as chunks:
            return b"".join(chunks)

    def _remove(self, step: int) -> None:
        name = f"checkpoint-{step}"
        self._store.remove(self._uri(f"{name}.json"))  # first: without it, the others do not count
        for file in self._store.list(self._uri(name)):
            self._store.remove(self._uri(name, file.name))

    def _uri(self, *names: str) -> str:
        return child_uri(self._prefix_uri, "/".join(names))


def _disk_errors(path: Path) -> AbstractContextManager[None]:
    """Translate errors of the disk, and of a checkpoint that training deleted meanwhile."""
    return map_exceptions({OSError: lambda error: StoreError(f"{path} cannot be used: {error}")})


def _step(name: str) -> int:
    """Return the step of a checkpoint's name; 0 for another name."""
    found = _FOLDER.fullmatch(name)
    return int(found[1]) if found else 0


def _hashes(manifest: bytes) -> dict[str, str]:
    try:
        found = json.loads(manifest)
        valid = isinstance(found, dict) and all(
            _FILE_NAME.fullmatch(name) and isinstance(sha256, str) for name, sha256 in found.items()
        )
    except ValueError:
        valid = False
    if not valid or _COMPLETE not in found:
        raise IntegrityError("the list of its files is damaged", found=repr(manifest[:200]))
    return found
