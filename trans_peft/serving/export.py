"""Write what serves on a base for other servers: PEFT folders, and the lists that they read.

    FOLDER/adapters/<engine name>/   one folder for each version, never overwritten
    FOLDER/manifest.json             the manifest: which version each name stands for
    FOLDER/<list>                    what the layout adds for its server

Names of folders contain the version and the hash, because a server that finds adapters by folder
keeps the old weights under a name whose files change. A folder that does not serve any more stays
for a while: vLLM 0.32 ends if a folder is gone that it reads again.
"""

import json
import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from trans_peft.domain.base import BaseVersion
from trans_peft.errors import (
    AdapterError,
    IntegrityError,
    InvalidSpecError,
    NotFoundError,
    StoreError,
)
from trans_peft.files import atomic_write
from trans_peft.lifecycle.reconcile import observe
from trans_peft.lifecycle.resolve import find_base
from trans_peft.ports import Platform
from trans_peft.serving.engine_check import EngineBase, check_for_engine
from trans_peft.serving.folders import AdapterFolders
from trans_peft.serving.manifest import (
    IdleEntry,
    ServedAdapter,
    ServingManifest,
    manifest_from_json,
    manifest_of,
    manifest_to_json,
)
from trans_peft.transfer.peft_folder import read_peft_folder

__all__ = ["Export", "ExportSettings", "Exported", "Layout", "watch"]

_log = logging.getLogger(__name__)

_KEPT_NAME = re.compile(r"[a-zA-Z0-9._-]+")
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for its largest rank."""


class Layout(StrEnum):
    """For which server the folder is written."""

    VLLM_FILESYSTEM = "vllm-filesystem"
    NIM = "nim"
    SGLANG = "sglang"
    LORAX = "lorax"
    KSERVE = "kserve"


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
        if self.layout is Layout.KSERVE:
            _check_pods_uri("the adapters", self.uri, "pass --uri, such as pvc://lora/v2/adapters")


@dataclass(frozen=True)
class Exported:
    """The result of one export.

    Attributes:
        manifest: What was written. Adapters that the server could not serve are idle in it.
        added: Engine names of the new folders.
        removed: Engine names of the folders that were removed.
    """

    manifest: ServingManifest
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    @property
    def refused(self) -> tuple[IdleEntry, ...]:
        """The adapters that serve by the registry, and that the server could not serve."""
        return tuple(entry for entry in self.manifest.idle if entry.reason == _UNSUPPORTED)


_UNSUPPORTED = "unsupported by the server"


class Export:
    """Keeps one folder in step with what serves on one base version.

    The base is chosen once: a server has one base, and a cut-over is another server with another
    folder. Raises NotFoundError for an unknown family or base, and InvalidSpecError if the folder
    was written for another base.
    """

    def __init__(
        self, settings: ExportSettings, family: str, base: str, platform: Platform
    ) -> None:
        self._settings = settings
        self._platform = platform
        self._base: BaseVersion = find_base(family, base, platform)
        self._path = settings.folder / "manifest.json"
        self._check_base()
        if settings.layout is Layout.KSERVE:
            _check_pods_uri("the base", self._base.uri, "publish the base to a bucket")
        engine = EngineBase(platform.catalog.fingerprint(self._base), settings.max_rank)
        self._adapters = settings.folder / "adapters"
        self._folders = AdapterFolders(
            self._adapters,
            platform.registry,
            lambda folder: check_for_engine(folder, engine),
            state=settings.folder / ".state",
            base_name=settings.model,
        )

    def sync(self) -> Exported:
        """Write what serves now. Raises StoreError, and changes nothing, if the registry is away.

        An adapter that the server could not serve is left out, and does not stop the others.
        """
        fleet = observe(self._base.family, self._platform)
        wanted = manifest_of(fleet, self._base)
        served, idle, added = [], list(wanted.idle), []
        for adapter in wanted.adapters:
            try:
                _check_name(adapter, self._settings.model)
                is_new = not self._folders.path(adapter).exists()
                self._folders.ensure(adapter)
            except (AdapterError, IntegrityError, InvalidSpecError, NotFoundError) as error:
                idle.append(IdleEntry(adapter.name, _UNSUPPORTED, str(error)))
                continue
            served.append(adapter)
            added += [adapter.engine_name] if is_new else []
        manifest = replace(
            wanted,
            adapters=tuple(served),
            idle=tuple(sorted(idle, key=lambda entry: entry.name)),
        )
        self._write_list(manifest)
        atomic_write(self._path, manifest_to_json(manifest) + "\n")
        removed = self._remove({adapter.engine_name for adapter in served})
        return Exported(manifest, tuple(added), removed)

    def _check_base(self) -> None:
        if not self._path.exists():
            return
        found = manifest_from_json(self._path.read_text(), str(self._path)).base
        if found.fingerprint_sha256 != self._base.fingerprint_sha256:
            raise InvalidSpecError(
                f"{self._settings.folder} was written for another base",
                expected=f"{self._base}, fingerprint {self._base.fingerprint_sha256[:12]}",
                found=f"{found}, fingerprint {found.fingerprint_sha256[:12]}",
                do="export to a folder of its own for each base, and start a server on it",
            )

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

        ranks = [_rank(self._folders.path(adapter)) for adapter in manifest.adapters]
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
        marks = self._settings.folder / ".state" / "revoked"
        marks.mkdir(parents=True, exist_ok=True)
        for name in served:
            (marks / name).unlink(missing_ok=True)
        kept = set(served)
        for folder in self._adapters.iterdir() if self._adapters.exists() else ():
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
    """Export again and again until `stopped` is set.

    A registry that is away changes nothing; that it is away, and that it is back, is logged once.
    """
    last: ServingManifest | None = None
    away = False
    while not stopped.is_set():
        try:
            exported = export.sync()
        except StoreError as error:
            if not away:
                _log.warning("the registry is away, and the folder stays as it is: %s", error)
            away = True
        else:
            if away:
                _log.info("the registry is back")
            away = False
            if exported.manifest != last or exported.removed:
                on_change(exported)
            last = exported.manifest
        stopped.wait(seconds)


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


def _rank(folder: Path) -> int:
    tensors = read_peft_folder(folder).tensors
    return max((shape[0] for key, shape in tensors.items() if "lora_A" in key), default=1)
