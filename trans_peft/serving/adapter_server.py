"""The adapters of one server process: follow the registry, and prepare the folders it loads.

`current` is the one of this process, which the plugin and the middleware of vLLM share. Nothing
here imports a server. Methods block; the middleware runs them in threads.
"""

import hashlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from trans_peft.bases.fingerprint import fingerprint
from trans_peft.domain.base import Fingerprint
from trans_peft.domain.names import name_problem
from trans_peft.errors import (
    AdapterError,
    IntegrityError,
    InvalidSpecError,
    NotFoundError,
    StoreError,
    TransPeftError,
)
from trans_peft.lifecycle.reconcile import observe
from trans_peft.lifecycle.resolve import find_fingerprint
from trans_peft.ports import Platform
from trans_peft.serving.folders import AdapterFolders, FolderError
from trans_peft.serving.manifest import ServedAdapter, manifest_of
from trans_peft.serving.router import NEXT_SUFFIX, BareBase, Refusal, RefusalReason, Router
from trans_peft.text.saved_template import saved_template
from trans_peft.transfer.engine_check import EngineBase, check_for_engine

__all__ = ["AdapterServer", "Prepared", "ServerSettings", "current", "set_current"]

_log = logging.getLogger(__name__)

_RETRY_S = 10.0
"""A failed preparation is repeated after this time at the earliest."""

_KEEP_UNUSED_S = 7 * 24 * 3600.0
"""A folder that no process has begun to use for this time is removed when a server starts."""


@dataclass(frozen=True)
class ServerSettings:
    """The settings of a server that follows the registry.

    Attributes:
        family: The base family (`TRANS_PEFT_SERVE_FAMILY`).
        folders: Where the adapters are kept (`TRANS_PEFT_SERVE_FOLDERS`).
        base_name: The name under which the bare base answers, unless an adapter has it; None: it
            does not answer (`TRANS_PEFT_SERVE_BASE_NAME`).
        poll_s: Seconds between two reads of the registry (`TRANS_PEFT_SERVE_POLL_S`).
    """

    family: str
    folders: Path
    base_name: str | None = None
    poll_s: float = 5.0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "ServerSettings":
        """Read the settings from variables. Raises InvalidSpecError."""
        family = environment.get("TRANS_PEFT_SERVE_FAMILY", "")
        poll = environment.get("TRANS_PEFT_SERVE_POLL_S", "") or "5"
        problems = [] if family else ["TRANS_PEFT_SERVE_FAMILY is not set"]
        try:
            poll_s = float(poll)
        except ValueError:
            poll_s = -1
        if not 0.1 <= poll_s <= 25:  # a change must reach the server within 30 s
            problems.append(f"TRANS_PEFT_SERVE_POLL_S must be 0.1 to 25 seconds, not {poll!r}")
        if problems:
            raise InvalidSpecError(
                f"the server cannot follow the registry: {'; '.join(problems)}",
                expected="the name of a base family, such as TRANS_PEFT_SERVE_FAMILY=smollm2",
                do="set the variables that docs/serving.md lists",
            )
        folders = environment.get("TRANS_PEFT_SERVE_FOLDERS") or "~/.cache/trans-peft/served"
        return cls(
            family,
            Path(folders).expanduser(),
            environment.get("TRANS_PEFT_SERVE_BASE_NAME") or None,
            poll_s,
        )


@dataclass(frozen=True)
class Prepared:
    """An adapter that the server can load.

    Attributes:
        folder: Its verified folder.
        chat_template: Its own chat template, if it differs from that of the base.
    """

    folder: Path
    chat_template: str | None = None


class AdapterServer:
    """What one server process serves.

    Raises UploadError, NotFoundError or InvalidSpecError in `start` if the base of the server is
    not a ready version of the family.
    """

    def __init__(
        self,
        settings: ServerSettings,
        platform: Platform,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self._platform = platform
        self._clock = clock
        self._base: Fingerprint | None = None
        self._folders: AdapterFolders | None = None
        self._router = Router(None)
        self._loaded: set[str] = set()
        self._answering: Counter[str] = Counter()
        self._prepared: dict[str, Prepared] = {}
        self._failed: dict[str, tuple[Refusal, float]] = {}
        self._guard = threading.Lock()

    def start(self, model: str, max_rank: int | None) -> None:
        """Compute the fingerprint of the server's base, and find it in the registry.

        `model` is the folder of the base, as the server was started with, and `max_rank` the
        largest rank that the server accepts. If the registry is away, the server refuses all names
        until a later `refresh` succeeds.
        """
        if not Path(model).is_dir():
            raise InvalidSpecError(
                f"the base of this server, {model!r}, is not a folder",
                expected="--model with a local folder, whose files can be verified",
                do="download the base version of the registry, and pass its folder",
            )
        self._base = fingerprint(str(Path(model).resolve()), self._platform.store)
        engine = EngineBase(self._base, max_rank, has_patterns=True, is_vllm=True)
        self._folders = AdapterFolders(
            self.settings.folders,
            self._platform.registry,
            lambda folder: check_for_engine(folder, engine),
        )
        with suppress(StoreError):  # refresh reports it
            find_fingerprint(self.settings.family, self._base.digest, self._platform)
        self.refresh()
        try:
            self._folders.remove_unused(self._router.engine_names, idle_s=_KEEP_UNUSED_S)
        except OSError as error:  # a file where a folder belongs, or another user's folder
            _log.warning("unused folders in %s stay: %s", self.settings.folders, error)

    def refresh(self) -> None:
        """Read the registry. If it cannot be read, keep what was read last, and log it once.

        If the base of this server is no longer a ready version of the family, nothing serves.
        """
        assert self._base is not None
        family, before = self.settings.family, self._router
        manifest, base_name, error = before.manifest, before.base_name, ""
        try:
            base = find_fingerprint(family, self._base.digest, self._platform)
            read = manifest_of(observe(family, self._platform), base)
            manifest, base_name = read, self._free_base_name()
        except StoreError as failure:
            error = str(failure)
        except TransPeftError as failure:
            manifest, error = None, str(failure)
        except Exception as failure:  # an answer of a shape that no check expected
            error = f"{type(failure).__name__}: {failure}"
        changed = (manifest is None) != (before.manifest is None) or not before.registry_error
        if error and changed:
            kept = "what is loaded stays" if manifest else "nothing is served"
            _log.warning("the registry cannot be read, and %s: %s", kept, error)
        elif manifest and before.registry_error and not error:
            _log.info("%s serves %d adapters", manifest.base, len(manifest.adapters))
        is_news = before.base_name is not None or before.manifest is None
        if manifest and not error and base_name != self.settings.base_name and is_news:
            _log.warning(
                "the bare base does not answer under TRANS_PEFT_SERVE_BASE_NAME=%s: an adapter has "
                "that name",
                self.settings.base_name,
            )
        with self._guard:
            self._router = Router(manifest, error, self._loaded, base_name)

    def route(self, model: object) -> ServedAdapter | BareBase | Refusal:
        """Return what answers a request for a model (`Router.route`)."""
        return self._router.route(model)

    def names(self) -> tuple[ServedAdapter, ...]:
        """Return the adapters that serve, by the last read."""
        manifest = self._router.manifest
        return manifest.adapters if manifest else ()

    def ready(self, adapter: ServedAdapter) -> Prepared | None:
        """Return an adapter whose folder was verified and is unchanged, without any request."""
        prepared = self._prepared.get(adapter.engine_name)
        if prepared is None or self._folders is None or not self._folders.is_unchanged(adapter):
            return None
        return prepared

    def prepare(self, adapter: ServedAdapter) -> Prepared | Refusal:
        """Download and verify an adapter, unless it is ready. Return why it cannot be loaded."""
        assert self._folders is not None and self._base is not None
        name = adapter.engine_name
        if (prepared := self.ready(adapter)) is not None:
            return prepared
        failed = self._failed.get(name)
        if failed is not None and self._clock() - failed[1] < _RETRY_S:
            return failed[0]
        self._prepared.pop(name, None)
        try:
            folder = self._folders.ensure(adapter)
            prepared = Prepared(folder, _own_template(folder, self._base))
        except (TransPeftError, OSError) as error:
            refusal = _refusal(adapter, error)
            self._failed[name] = refusal, self._clock()
            _log.warning("%s cannot be served: %s", name, error)
            return refusal
        self._failed.pop(name, None)
        self._prepared[name] = prepared
        return prepared

    @contextmanager
    def answering(self, engine_name: str) -> Iterator[None]:
        """Keep an adapter loaded for the duration of a request, even if it is revoked meanwhile."""
        with self._guard:
            self._answering[engine_name] += 1
        try:
            yield
        finally:
            with self._guard:
                self._answering[engine_name] -= 1
                self._answering += Counter()  # drops the names without requests

    def load(self, engine_name: str) -> Path | None:
        """Return the folder that the server loads under an engine name, and note that it did.

        Returns None for a name that neither serves nor has a request, or that was not prepared.
        """
        with self._guard:
            prepared = self._prepared.get(engine_name)
            if prepared is None or engine_name not in self._needed():
                return None
            self._loaded.add(engine_name)
        return prepared.folder

    def revoked(self) -> tuple[str, ...]:
        """Return the engine names that are loaded, do not serve and have no request, sorted."""
        with self._guard:
            return tuple(sorted(self._loaded - self._needed()))

    def unloaded(self, engine_name: str) -> None:
        """Note that the server has unloaded a name."""
        with self._guard:
            self._loaded.discard(engine_name)

    def _free_base_name(self) -> str | None:
        """Return the name of the bare base, unless an adapter has it: a retired one as well."""
        if self.settings.base_name is None:
            return None
        name = self.settings.base_name.removesuffix(NEXT_SUFFIX)
        if name_problem("the name", name) is None:
            with suppress(NotFoundError):
                self._platform.registry.family(name)
                return None
        return self.settings.base_name

    def _needed(self) -> frozenset[str]:
        return self._router.engine_names | self._answering.keys()


_current: AdapterServer | None = None


def current() -> AdapterServer | None:
    """Return the adapters of this process's server, or None before its middleware has started."""
    return _current


def set_current(server: AdapterServer | None) -> None:
    """Set what `current` returns."""
    global _current
    _current = server


def _own_template(folder: Path, base: Fingerprint) -> str | None:
    template = saved_template(folder)
    if template is None:
        return None
    same = hashlib.sha256(template.encode()).hexdigest() == base.chat_template_sha256
    return None if same else template


def _refusal(adapter: ServedAdapter, error: TransPeftError | OSError) -> Refusal:
    reason = RefusalReason.NOT_SERVED
    if isinstance(error, (IntegrityError, FolderError)):
        reason = RefusalReason.DAMAGED
    elif isinstance(error, AdapterError):
        reason = RefusalReason.UNSUPPORTED
    elif isinstance(error, StoreError):
        reason = RefusalReason.REGISTRY_AWAY
    elif not isinstance(error, NotFoundError):
        reason = RefusalReason.DAMAGED
    return Refusal(reason, f"{adapter.name} version {adapter.number} cannot be loaded: {error}")
