"""Folders of adapters for servers: one for each version and hash, complete and never overwritten.

A server may read an adapter from its folder again at any time: vLLM does after it evicted it from
memory, and then serves other bytes under the old name, or ends if the folder is gone.

    <root>/<engine name>/        a verified PEFT folder with the record `.complete`, without files
                                 that its hash does not cover
    <state>/part/<engine name>/  an unfinished download; renamed to the former when it is complete
    <state>/use/<engine name>    locked (shared) by each process that uses the folder, until it ends
    <state>/lock/<engine name>   locked by the process that downloads or removes the folder
    <state>/damaged/<engine name>/  a folder whose files were changed (`set_damaged_aside`)
"""

import fcntl
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from trans_peft.domain.adapter import AdapterVersion
from trans_peft.errors import (
    IntegrityError,
    NotFoundError,
    StoreError,
    TransPeftError,
    full_disk_error,
    is_full_disk,
    map_exceptions,
    replacing_paths_in_errors,
)
from trans_peft.files import atomic_write
from trans_peft.models import adapter_weights_sha256
from trans_peft.ports import AdapterRegistry
from trans_peft.serving.manifest import ServedAdapter
from trans_peft.text.saved_template import TEMPLATE_NAME
from trans_peft.transfer.peft_folder import CONFIG_NAME, WEIGHTS_NAME, read_peft_folder

__all__ = ["COMPLETE", "AdapterFolders", "FolderError", "folder_error"]

COMPLETE = ".complete"
"""The record in a complete folder: the engine name and the whole hash, on two lines."""

_ENGINE_NAME = re.compile(r".+\.v[0-9]+\.([0-9a-f]{12})")
_Stats = tuple[tuple[str, int, int, int, int], ...]


class FolderError(StoreError):
    """A folder of this machine cannot be used, for example because a file is in its place."""


class AdapterFolders:
    """The folders below `root`, which servers and processes on one machine can share.

    Args:
        root: The folder of the folders.
        registry: Where they are downloaded from.
        check: Raises an error for a folder that the server would not serve as it was trained
            (`engine_check.check_for_engine`).
        state: A folder on the same disk for locks and unfinished downloads; by default
            `root/.state`.
        base_name: What `base_model_name_or_path` must be in adapter_config.json, for servers that
            compare it; by default it stays as it was registered.
    """

    def __init__(
        self,
        root: Path,
        registry: AdapterRegistry,
        check: Callable[[Path], None] | None = None,
        *,
        state: Path | None = None,
        base_name: str | None = None,
    ) -> None:
        self._root = Path(root).resolve()
        self._state = (state or self._root / ".state").resolve()
        self._registry = registry
        self._check = check
        self._base_name = base_name
        self._verified: dict[str, _Stats] = {}
        self._hashed: dict[str, tuple[_Stats, str]] = {}
        self._handles: dict[str, int] = {}
        self._guard = threading.Lock()

    def path(self, adapter: ServedAdapter) -> Path:
        """Return the folder of an adapter, which may not exist yet."""
        return self._root / adapter.engine_name

    def ensure(self, adapter: ServedAdapter) -> Path:
        """Return the verified folder of an adapter; download it first if it is missing.

        The weights are hashed once in each process. From then on this process uses the folder, so
        that no `remove_unused` removes it.

        Raises IntegrityError if the folder has other content or cannot be read, AdapterError if the
        server cannot serve it, NotFoundError if the registry no longer has this version, and
        StoreError if the registry or the disk fails.
        """
        folder, name = self.path(adapter), adapter.engine_name
        with map_exceptions({OSError: lambda error: folder_error(self._root, error)}):
            self._root.mkdir(parents=True, exist_ok=True)
            with self._locked(name):
                self._hold(name)
                if not (folder.exists() or folder.is_symlink()):
                    self._verified[name] = self._download(adapter)
                # The files may have changed since they were read: what is recorded is older.
                before = _readable_stats(folder)
                if self._verified.get(name) != before:
                    self._verify(adapter, folder)
                    self._verified[name] = before
        return folder

    def set_damaged_aside(self, adapters: Collection[ServedAdapter]) -> tuple[str, ...]:
        """Move damaged folders to `<state>/damaged`, and return their engine names, sorted.

        A folder is damaged if its files are not those of its engine name: of the adapter in
        `adapters`, or else of any adapter whose hash begins as the name says. Servers do not find
        it any more, and `ensure` downloads it again. Entries without an engine name stay.
        """
        known = {adapter.engine_name: adapter.weights_sha256 for adapter in adapters}
        damaged = []
        for folder in sorted(self._root.iterdir()):
            named = _ENGINE_NAME.fullmatch(folder.name)
            if named is None:
                continue
            with self._locked(folder.name):
                if not self._is_intact(folder, known.get(folder.name, named[1])):
                    folder.rename(self._vacant("damaged", folder.name))
                    damaged.append(folder.name)
        return tuple(damaged)

    def is_unchanged(self, adapter: ServedAdapter) -> bool:
        """Whether no file of a folder was changed, added or removed since `ensure` verified it."""
        verified = self._verified.get(adapter.engine_name)
        try:
            return verified is not None and verified == _stats(self.path(adapter))
        except OSError:
            return False

    def release(self, keep: Collection[str] = ()) -> None:
        """Stop using all folders except those whose engine names are in `keep`."""
        with self._guard:
            for name in [name for name in self._handles if name not in keep]:
                os.close(self._handles.pop(name))

    def remove_unused(self, keep: Collection[str] = (), *, idle_s: float = 0) -> tuple[str, ...]:
        """Remove the folders that no process uses, and return their names, sorted.

        `keep` has the engine names of folders that stay in any case. Folders that a process began
        to use less than `idle_s` seconds ago stay as well.
        """
        removed = []
        for record in sorted(self._root.glob(f"*/{COMPLETE}")):
            folder = record.parent
            if folder.name in keep or folder.name in self._handles:
                continue
            with self._locked(folder.name):
                if self._is_unused(folder.name, idle_s):
                    gone = self._vacant("part", folder.name)
                    folder.rename(gone)
                    shutil.rmtree(gone, ignore_errors=True)
                    removed.append(folder.name)
        return tuple(removed)

    def _download(self, adapter: ServedAdapter) -> _Stats:
        """Download an adapter, and return the files' state from before they were verified."""
        part = self._vacant("part", adapter.engine_name)
        try:
            with replacing_paths_in_errors({part: f"{adapter.name} version {adapter.number}"}):
                self._registry.download(self._version(adapter), part)
                _remove_other_files(part)
                if self._base_name is not None:
                    _rename_base(part, self._base_name)
                for path in part.rglob("*"):
                    if path.is_file():
                        path.chmod(0o444)
                        _sync(path)
                record = f"{adapter.engine_name}\n{adapter.weights_sha256}\n"
                atomic_write(part / COMPLETE, record)
                before = _readable_stats(part)
                self._verify(adapter, part)
            _sync(part)
            part.rename(self.path(adapter))
            _sync(self._root)
            return before
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _version(self, adapter: ServedAdapter) -> AdapterVersion:
        for version in self._registry.versions(adapter.name):
            if (version.number, version.weights_sha256) == (adapter.number, adapter.weights_sha256):
                return version
        raise NotFoundError(
            f"the registry no longer has {adapter.name} version {adapter.number}",
            expected=f"weights {adapter.weights_sha256}",
            do="read the manifest again",
        )

    def _verify(self, adapter: ServedAdapter, folder: Path) -> None:
        found = self._weights_sha256(folder)
        if found != adapter.weights_sha256:
            raise IntegrityError(
                f"the files in {folder} are not those of {adapter.name} version {adapter.number}",
                expected=adapter.weights_sha256,
                found=found,
                do="find out who changed them, and move the folder away: it is downloaded again",
            )
        recorded = _recorded_base(folder)
        if self._base_name not in (None, recorded):
            raise IntegrityError(
                f"{folder} was written for a server with another --model",
                expected=self._base_name,
                found=recorded,
                do="write to another folder",
            )
        if self._check is not None:
            self._check(folder)

    def _is_intact(self, folder: Path, sha256: str) -> bool:
        """Whether the hash of a folder begins with `sha256`, and the folder is for this base."""
        with suppress(OSError):
            if self._verified.get(folder.name) == _stats(folder):
                return True
        if not self._weights_sha256(folder).startswith(sha256):
            return False
        try:
            return self._base_name in (None, _recorded_base(folder))
        except TransPeftError:
            return False

    def _weights_sha256(self, folder: Path) -> str:
        """Return the hash of the weights, or why there is none; hash again only after a change."""
        try:
            before = _stats(folder)
            known, found = self._hashed.get(folder.name, ((), ""))
            if known != before:
                found = adapter_weights_sha256(folder)
                self._hashed[folder.name] = before, found
        except NotFoundError as error:
            return f"a file is missing: {error}"
        except (TransPeftError, OSError, ValueError) as error:
            return f"it cannot be read: {error}"
        return found

    def _locked(self, name: str) -> FileLock:
        for kind in ("use", "lock"):
            (self._state / kind).mkdir(parents=True, exist_ok=True)
        return FileLock(self._state / "lock" / name)

    def _vacant(self, kind: str, name: str) -> Path:
        """Return a path below the state, without what another process left there."""
        path = self._state / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return path

    def _hold(self, name: str) -> None:
        """Hold a shared lock until this process ends; the kernel releases it even after a kill."""
        with self._guard:
            if name not in self._handles:
                path = self._state / "use" / name
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                fcntl.flock(handle, fcntl.LOCK_SH)
                os.utime(path)
                self._handles[name] = handle

    def _is_unused(self, name: str, idle_s: float) -> bool:
        handle = os.open(self._state / "use" / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return time.time() - os.fstat(handle).st_mtime >= idle_s
        except BlockingIOError:
            return False
        finally:
            os.close(handle)


def _stats(folder: Path) -> _Stats:
    """Return name, size, times in ns and inode of every file; any write changes one of them."""
    found = []
    for path in sorted(folder.iterdir()):
        stat = path.stat()
        found.append((path.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))
    return tuple(found)


def _readable_stats(folder: Path) -> _Stats:
    """Return `_stats`. Raises IntegrityError if the folder is a file, or has a dangling link."""
    try:
        return _stats(folder)
    except OSError as error:
        raise IntegrityError(
            f"{folder} cannot be read",
            expected="a folder with the files of one adapter",
            found=error,
            do="find out who changed it, and move it away: it is downloaded again",
        ) from error


def folder_error(folder: Path, error: OSError) -> StoreError:
    """Return the error for a folder of this library that cannot be read or written."""
    if is_full_disk(error):
        return full_disk_error(folder, error)
    return FolderError(
        f"the folder {folder} cannot be used",
        expected="folders and files that this program may read and write, as it created them",
        found=error,
        do="move away the file or folder that is in the way, or correct its permissions",
    )


def _remove_other_files(folder: Path) -> None:
    """Remove files that the hash of the weights does not cover, such as synthetic prompts."""
    for path in folder.iterdir():
        if path.name in (CONFIG_NAME, WEIGHTS_NAME, TEMPLATE_NAME):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _recorded_base(folder: Path) -> object:
    return read_peft_folder(folder).config.get("base_model_name_or_path")


def _rename_base(folder: Path, base_name: str) -> None:
    """Set `base_model_name_or_path`, which the hash of the weights does not cover."""
    config = dict(read_peft_folder(folder).config)
    if config.get("base_model_name_or_path") != base_name:
        config["base_model_name_or_path"] = base_name
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
