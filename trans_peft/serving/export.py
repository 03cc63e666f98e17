"""Write what serves on a base for other servers: PEFT folders, and the lists that they read.

    FOLDER/adapters/<engine name>/   one folder for each version, never overwritten
    FOLDER/manifest.json             the manifest: which version each name stands for
    FOLDER/<list>                    what the layout adds for its server

Names of folders contain the version and the hash, because a server that finds adapters by folder
keeps the old weights under a name whose files change. A folder that does not serve any more stays
for a while: vLLM 0.32 ends if a folder is gone that it reads again. A folder whose files were
changed is moved away at once.
"""

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from filelock import FileLock

from trans_peft.domain.base import BaseVersion
from trans_peft.errors import (
    IntegrityError,
    InvalidSpecError,
    NotFoundError,
    StoreError,
    TransPeftError,
    map_exceptions,
)
from trans_peft.files import atomic_write
from trans_peft.lifecycle.reconcile import observe
from trans_peft.lifecycle.resolve import find_base
from trans_peft.ports import Platform
from trans_peft.serving.folders import AdapterFolders, folder_error
from trans_peft.serving.manifest import (
    IdleEntry,
    ServedAdapter,
    ServingManifest,
    manifest_from_json,
    manifest_of,
    manifest_to_json,
)
from trans_peft.transfer.engine_check import EngineBase, check_for_engine, lora_rank

__all__ = ["Export", "ExportSettings", "Exported", "Layout", "LeftOut", "check_pause", "watch"]

_log = logging.getLogger(__name__)

_KEPT_NAME = re.compile(r"[a-zA-Z0-9._-]+")
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for its largest rank."""
_PAUSES_S = (0.1, 86400.0)


class Layout(StrEnum):
    """For which server the folder is written."""

    VLLM_FILESYSTEM = "vllm-filesystem"
    NIM = "nim"
    SGLANG = "sglang"
    LORAX = "lorax"
    KSERVE = "kserve"

    @property
    def is_vllm(self) -> bool:
        """Whether the server runs vLLM."""
        return self not in (Layout.SGLANG, Layout.LORAX)


class LeftOut(StrEnum):
    """Why an export leaves out an adapter that serves by the registry."""

    UNSUPPORTED = "unsupported by the server"
    DAMAGED = "damaged"
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True)
class ExportSettings:
    """What is exported, and where to.

    Attributes:
        folder: The folder to write.
        layout: The server that reads it.
        model: The base's name for the server: the string after `--model`.
        uri: The URI of `folder/adapters` for the server's pods; for `kserve` only.
        max_rank: The largest rank that the server accepts; None if it has no limit.
        grace_s: How many seconds a folder stays after its adapter stopped serving.
    """

    folder: Path
    layout: Layout
    model: str
    uri: str = ""
    max_rank: int | None = None
    grace_s: float = 3600.0

    def __post_init__(self) -> None:
        if not self.model:
            raise InvalidSpecError(
                "the export needs the base's name for the server",
                expected="the string that the server gets as --model",
            )
        if self.max_rank is not None and self.max_rank < 1:
            raise InvalidSpecError(
                "no adapter has a rank within the largest rank of the export",
                expected="a whole number from 1, or none for a server without a limit",
                found=self.max_rank,
                do="pass the server's own largest rank, such as its --max-lora-rank",
            )
        if not self.grace_s >= 0:  # not a number, too
            raise InvalidSpecError(
                "folders cannot stay for this time",
                expected="a number of seconds from 0",
                found=self.grace_s,
                do="pass 0 to remove a folder as soon as its adapter stops serving",
            )
        if self.layout is Layout.KSERVE:
            _check_pods_uri("the adapters", self.uri, "pass --uri, such as pvc://lora/v2/adapters")


@dataclass(frozen=True)
class Exported:
    """The result of one export.

    Attributes:
        manifest: What was written. Adapters that were left out are idle in it.
        before: The adapters that the folder listed before.
        added: Engine names of the new folders.
        removed: Engine names of the folders that were removed.
        damaged: Engine names of the folders whose files had been changed. They are in
            `.state/damaged`, and those that serve were downloaded again.
    """

    manifest: ServingManifest
    before: tuple[ServedAdapter, ...] = ()
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()

    @property
    def refused(self) -> tuple[IdleEntry, ...]:
        """The adapters that serve by the registry and were left out."""
        return tuple(entry for entry in self.manifest.idle if entry.reason in set(LeftOut))

    @property
    def revoked(self) -> tuple[IdleEntry, ...]:
        """The adapters that the folder listed before and that do not serve any more."""
        names = {adapter.name for adapter in self.manifest.adapters}
        idle = {entry.name: entry for entry in self.manifest.idle}
        gone = [adapter.name for adapter in self.before if adapter.name not in names]
        left_out = {entry.name for entry in self.refused}
        return tuple(
            idle.get(name) or IdleEntry(name, "absent", f"{name} is not a live adapter any more")
            for name in gone
            if name not in left_out
        )


class Export:
    """Keeps one folder in step with what serves on one base version.

    The base is chosen once: a server has one base, and a cut-over is another server with another
    folder. Raises NotFoundError for an unknown family or base, and InvalidSpecError if the folder
    was written for another base or under another name of the base.
    """

    def __init__(
        self, settings: ExportSettings, family: str, base: str, platform: Platform
    ) -> None:
        self._settings = settings
        self._platform = platform
        self._base: BaseVersion = find_base(family, base, platform)
        self._path = settings.folder / "manifest.json"
        self._state = settings.folder / ".state"
        self._target = (
            f"fingerprint {self._base.fingerprint_sha256}, --model {settings.model}\n".encode()
        )
        with self._translating_errors():
            self._listed()
        if settings.layout is Layout.KSERVE:
            _check_pods_uri("the base", self._base.uri, "publish the base to a bucket")
        engine = EngineBase(
            platform.catalog.fingerprint(self._base),
            settings.max_rank,
            is_vllm=settings.layout.is_vllm,
        )
        self._adapters = settings.folder / "adapters"
        self._folders = AdapterFolders(
            self._adapters,
            platform.registry,
            lambda folder: check_for_engine(folder, engine),
            state=self._state,
            base_name=settings.model,
        )

    def sync(self) -> Exported:
        """Write what serves now. Raises StoreError, and changes nothing, if the registry is away.

        Revoked adapters leave the lists first, before any download. An adapter that cannot be
        downloaded, or that the server could not serve, is left out and does not stop the others.

        Raises InvalidSpecError if the folder was written for another base since, and StoreError if
        the folder cannot be written.
        """
        with self._translating_errors(), self._locked():
            before = self._listed()
            wanted = manifest_of(observe(self._base.family, self._platform), self._base)
            atomic_write(self._record, self._target)
            self._adapters.mkdir(exist_ok=True)
            first = self._verified(
                wanted, _without_downloads(wanted.adapters, before, self._names())
            )
            if first.adapters != before:
                self._write(first)
            damaged = self._folders.set_damaged_aside((*before, *wanted.adapters))
            present = self._names()
            manifest = self._verified(wanted, wanted.adapters)
            self._write(manifest)
            served = {adapter.engine_name for adapter in manifest.adapters}
            removed = self._remove(served)
            return Exported(manifest, before, tuple(sorted(served - present)), removed, damaged)

    def _names(self) -> set[str]:
        return {path.name for path in self._adapters.iterdir()}

    def _verified(
        self, wanted: ServingManifest, adapters: Sequence[ServedAdapter]
    ) -> ServingManifest:
        """Download and verify adapters, and return the manifest with those that can be served."""
        served, idle = [], list(wanted.idle)
        for adapter in adapters:
            try:
                _check_name(adapter, self._settings.model)
                self._folders.ensure(adapter)
            except TransPeftError as error:
                idle.append(IdleEntry(adapter.name, _left_out(error), str(error)))
            else:
                served.append(adapter)
        return replace(
            wanted,
            adapters=tuple(served),
            idle=tuple(sorted(idle, key=lambda entry: entry.name)),
        )

    def _write(self, manifest: ServingManifest) -> None:
        self._write_list(manifest)
        atomic_write(self._path, manifest_to_json(manifest) + "\n")

    def _listed(self) -> tuple[ServedAdapter, ...]:
        """Return what the folder lists. Raises InvalidSpecError if it is for another base."""
        text = _read(self._path)
        manifest = None if text is None else _manifest(text, self._path)
        if manifest is not None:
            found = manifest.base
            if found.fingerprint_sha256 != self._base.fingerprint_sha256:
                raise self._other_base(
                    f"{self._base}, fingerprint {self._base.fingerprint_sha256[:12]}",
                    f"{found}, fingerprint {found.fingerprint_sha256[:12]}",
                )
        recorded = _read(self._record)
        if recorded not in (None, self._target):
            raise self._other_base(
                self._target.decode().strip(), recorded.decode(errors="replace").strip()
            )
        return manifest.adapters if manifest else ()

    def _other_base(self, expected: str, found: str) -> InvalidSpecError:
        return InvalidSpecError(
            f"{self._settings.folder} was written for another base, or under another --model",
            expected=expected,
            found=found,
            do="export to a folder of its own for each base, and start a server on it",
        )

    @property
    def _record(self) -> Path:
        """The file that states for which base the folder is; written before any download."""
        return self._state / "base"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Wait until no other process writes this folder."""
        self._state.mkdir(parents=True, exist_ok=True)
        with FileLock(self._state / "export.lock"):
            yield

    def _translating_errors(self) -> AbstractContextManager[None]:
        folder = self._settings.folder
        return map_exceptions({OSError: lambda error: folder_error(folder, error)})

    def _write_list(self, manifest: ServingManifest) -> None:
        match self._settings.layout:
            case Layout.VLLM_FILESYSTEM | Layout.NIM:
                return  # these servers find adapters by folder
            case Layout.SGLANG:
                name, value = "lora-paths.json", self._sglang(manifest)
            case Layout.LORAX:
                name, value = "lorax.json", self._lorax(manifest)
            case Layout.KSERVE:
                self._write_kserve(manifest)
                return
        atomic_write(self._settings.folder / name, json.dumps(value, indent=2) + "\n")

    def _sglang(self, manifest: ServingManifest) -> object:
        return [
            {"lora_name": item.name, "lora_path": str(self._folders.path(item)), "pinned": False}
            for item in manifest.adapters
        ]

    def _lorax(self, manifest: ServingManifest) -> object:
        return {
            item.name: {"adapter_id": str(self._folders.path(item)), "adapter_source": "local"}
            for item in manifest.adapters
        }

    def _write_kserve(self, manifest: ServingManifest) -> None:
        import yaml

        ranks = [lora_rank(self._folders.path(adapter)) for adapter in manifest.adapters]
        largest = self._settings.max_rank or max(ranks, default=1)
        prefix = self._settings.uri.rstrip("/")
        service = {
            "apiVersion": "serving.kserve.io/v1alpha2",
            "kind": "LLMInferenceService",
            "metadata": {
                "name": re.sub(r"[^a-z0-9-]", "-", str(manifest.base).lower()),
                "annotations": {"trans-peft/base": manifest.base.fingerprint_sha256},
            },
            "spec": {
                "model": {
                    "uri": self._base.uri,
                    "name": self._settings.model,
                    "lora": {
                        "maxRank": next((rank for rank in _RANKS if rank >= largest), largest),
                        "maxAdapters": max(1, len(manifest.adapters)),
                        "adapters": [
                            {"name": item.name, "uri": f"{prefix}/{item.engine_name}"}
                            for item in manifest.adapters
                        ],
                    },
                }
            },
        }
        text = yaml.safe_dump(service, sort_keys=False)
        atomic_write(self._settings.folder / "llminferenceservice.yaml", text)

    def _remove(self, served: set[str]) -> tuple[str, ...]:
        """Remove the folders that have not served for `grace_s`; the rest stay for now."""
        marks = self._state / "revoked"
        marks.mkdir(parents=True, exist_ok=True)
        for name in served:
            (marks / name).unlink(missing_ok=True)
        kept = set(served)
        for folder in self._adapters.iterdir():
            mark = marks / folder.name
            if folder.name not in served and not mark.exists():
                mark.touch()
            if mark.exists() and time.time() - mark.stat().st_mtime < self._settings.grace_s:
                kept.add(folder.name)
        self._folders.release()  # a server uses them, and not this process
        removed = self._folders.remove_unused(kept)
        for name in removed:
            (marks / name).unlink(missing_ok=True)
        return removed


def watch(
    export: Export,
    seconds: float,
    *,
    stopped: threading.Event,
    on_change: Callable[[Exported], None] = lambda _: None,
) -> None:
    """Export again and again until `stopped` is set, with a pause of `seconds` (`check_pause`).

    If the registry is away, or the folder cannot be written, the next read tries again; this, and
    that the export works again, is logged once.
    """
    check_pause(seconds)
    last: ServingManifest | None = None
    away = False
    while not stopped.is_set():
        try:
            exported = export.sync()
        except StoreError as error:
            if not away:
                _log.warning("the export failed, and the next read tries again: %s", error)
            away = True
        else:
            if away:
                _log.info("the export works again")
            away = False
            if exported.manifest != last or exported.removed or exported.damaged:
                on_change(exported)
            last = exported.manifest
        stopped.wait(seconds)


def check_pause(seconds: float) -> None:
    """Raise InvalidSpecError for a pause between two reads that is too short or too long."""
    shortest, longest = _PAUSES_S
    if not shortest <= seconds <= longest:  # not a number, too
        raise InvalidSpecError(
            "the registry cannot be read with this pause between two reads",
            expected=f"seconds from {shortest:g} to {longest:g}",
            found=seconds,
            do="pass --watch with a few seconds, such as 5",
        )


def _without_downloads(
    wanted: Sequence[ServedAdapter], before: Sequence[ServedAdapter], present: Collection[str]
) -> tuple[ServedAdapter, ...]:
    """Return what can be listed before anything is downloaded.

    An adapter whose new version has no folder yet keeps the version that was listed before, so that
    its name answers during the download.
    """
    listed = {adapter.name: adapter for adapter in before}
    found: list[ServedAdapter] = []
    for adapter in wanted:
        versions = (adapter, listed.get(adapter.name, adapter))
        found += [version for version in versions if version.engine_name in present][:1]
    return tuple(found)


def _left_out(error: TransPeftError) -> LeftOut:
    if isinstance(error, IntegrityError):
        return LeftOut.DAMAGED
    if isinstance(error, (StoreError, NotFoundError)):
        return LeftOut.UNAVAILABLE
    return LeftOut.UNSUPPORTED


def _read(path: Path) -> bytes | None:
    """Return a file that an export wrote, or None if it is missing."""
    if not path.exists():
        return None
    if not path.is_file():
        raise IntegrityError(
            f"{path} is not a file",
            expected="a file that an export wrote",
            found="a folder" if path.is_dir() else "something else",
            do="remove it, or export to another folder",
        )
    return path.read_bytes()


def _manifest(text: bytes, path: Path) -> ServingManifest:
    try:
        return manifest_from_json(text, str(path))
    except IntegrityError as error:
        raise IntegrityError(
            f"{path} is not a manifest of this version",
            expected="the manifest that an export wrote",
            found=error,
            do="remove it: the next export writes it again",
        ) from error


def _check_pods_uri(what: str, uri: str, do: str) -> None:
    """Raise InvalidSpecError for a URI from which KServe's pods cannot load."""
    schemes = ("hf://", "s3://", "pvc://")
    if not uri.startswith(schemes):
        raise InvalidSpecError(
            f"the pods of the layout kserve cannot load {what}",
            expected=f"a URI that begins with one of {', '.join(schemes)}",
            found=repr(uri),
            do=do,
        )


def _check_name(adapter: ServedAdapter, model: str) -> None:
    """Raise InvalidSpecError if a server would replace characters of a name, or confuse it."""
    for name in (adapter.name, adapter.engine_name):
        if not _KEPT_NAME.fullmatch(name) or name in (".", "..") or name == model:
            raise InvalidSpecError(
                f"a server would not keep the name {name!r}",
                expected="letters, digits, '.', '_' and '-', and not the name of the base",
                do="register the adapter under another name, or give the base another one",
            )
