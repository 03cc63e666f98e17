"""The ports that the command line works with, and what it keeps between two commands.

The state folder holds evaluations by key, fingerprints by the state of the files they were read
from, copies of bases from buckets, and checkpoints of unfinished training. All of it can be
deleted: it only saves time.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from trans_peft.artifacts import download_files
from trans_peft.cli.files import write_json
from trans_peft.cli.show import ProgressDisplay
from trans_peft.domain.base import BaseVersion, Fingerprint
from trans_peft.domain.evaluation import Evaluation
from trans_peft.domain.identity import content_sha256
from trans_peft.domain.names import LONGEST_NAME, name_problem
from trans_peft.edges.memory import MemoryCatalog, MemoryRegistry, MemoryRunLog
from trans_peft.edges.stores import SchemeStore
from trans_peft.errors import InvalidSpecError, NotFoundError
from trans_peft.ports import Platform
from trans_peft.validation.guards import guards_named

__all__ = [
    "FETCHED",
    "LOCAL",
    "EvaluationFolder",
    "Workspace",
    "adapter_name",
    "base_label",
    "check_free",
]

FETCHED: dict[Path, str] = {}
"""Copies of adapters from buckets, and where each came from: errors name that place."""

LOCAL = "local"
"""The family of bases that nobody named one for."""


class EvaluationFolder:
    """`EvaluationStore` as JSON files named by key."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> Evaluation | None:
        """Return the evaluation with that key, or None."""
        from pydantic import TypeAdapter

        path = self._path(key)
        if not path.is_file():
            return None
        return TypeAdapter(Evaluation).validate_json(path.read_bytes())

    def put(self, evaluation: Evaluation, *, labels: Mapping[str, str] | None = None) -> None:
        """Keep an evaluation. The same key again changes nothing."""
        if not self._path(evaluation.key).exists():
            write_json(self._path(evaluation.key), evaluation)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.json"


@dataclass(frozen=True)
class Workspace:
    """A platform of files and memory, and the progress that its user sees."""

    platform: Platform
    progress: ProgressDisplay

    @classmethod
    def at(cls, state: Path, progress: ProgressDisplay) -> "Workspace":
        """Open a workspace whose state lies in a folder.

        It reads any local path, since its user named it. The environment variable
        TRANS_PEFT_SANDBOX_MAY_LACK lists the guards of the sandbox for generated code that this
        machine may lack.
        """
        state = state.resolve()
        lacking = os.environ.get("TRANS_PEFT_SANDBOX_MAY_LACK", "")
        platform = Platform(
            store=SchemeStore(),
            catalog=MemoryCatalog(),
            registry=MemoryRegistry(),
            evaluations=EvaluationFolder(state / "evaluations"),
            runs=MemoryRunLog(),
            work_dir=state,
            may_lack=guards_named([name.strip() for name in lacking.split(",") if name.strip()]),
        )
        return cls(platform, progress)

    def base(self, named: str, family: str) -> BaseVersion:
        """Fingerprint a base and put it in the catalog; its version is named after its path.

        UploadError where its files do not fill the model that loads them.
        """
        uri = _absolute(named)
        fingerprint = self.fingerprint(uri)
        self._check(uri, fingerprint)
        if "://" not in uri:
            self._use_in_place(Path(uri), fingerprint)
        return self.platform.catalog.make_ready(
            family,
            base_label(uri),
            uri,
            fingerprint=fingerprint,
            parent=None,
            source="command line",
        )

    def fingerprint(self, uri: str) -> Fingerprint:
        """Return a base's fingerprint, read anew only if one of its files changed."""
        from pydantic import TypeAdapter

        from trans_peft.bases.fingerprint import fingerprint

        uri = _absolute(uri)
        files = [(file.name, file.size, file.etag) for file in self.platform.store.list(uri)]
        known = self.platform.work_dir / "fingerprints" / f"{content_sha256([uri, files])}.json"
        if known.is_file():
            return TypeAdapter(Fingerprint).validate_json(known.read_bytes())
        found = fingerprint(
            uri,
            self.platform.store,
            on_progress=lambda done, total: self.progress.show(f"reading {uri}", done, total, "B"),
        )
        write_json(known, found)
        return found

    def adapter(self, uri: str) -> Path:
        """Return the folder of a PEFT adapter, fetched where it is in a bucket. AdapterError."""
        from trans_peft.transfer.peft_folder import read_peft_folder

        if "://" not in uri:
            return read_peft_folder(Path(uri)).path
        files = [file for file in self.platform.store.list(uri) if "/" not in file.name]
        if not files:
            raise NotFoundError(f"there is nothing at {uri}")
        name = hashlib.sha256(repr((uri, files)).encode()).hexdigest()
        folder = self.platform.work_dir / "adapters" / name
        folder.mkdir(parents=True, exist_ok=True)
        FETCHED[folder] = uri
        used = [file for file in files if file.name.endswith((".json", ".safetensors", ".jinja"))]
        download_files(uri, used, self.platform.store, folder)
        return read_peft_folder(folder).path

    def _check(self, uri: str, fingerprint: Fingerprint) -> None:
        """Hold a base against the model that loads it, once for each content."""
        from trans_peft.bases.checkpoint import read_checkpoint
        from trans_peft.bases.model_check import check_checkpoint

        key = content_sha256([fingerprint.digest, version("transformers")])
        passed = self.platform.work_dir / "checked" / key
        if not passed.exists():
            read = read_checkpoint(uri, self.platform.store, fingerprint.tensors)
            check_checkpoint(read, uri)
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()

    def _use_in_place(self, folder: Path, fingerprint: Fingerprint) -> None:
        """Let the cache of bases point at a local folder, which needs no copy."""
        link = self.platform.work_dir / "bases" / fingerprint.digest
        if link.is_symlink():
            link.unlink()
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(folder, target_is_directory=True)


def adapter_name(uri: str) -> str:
    """Return what an adapter is called where nobody named it: `runs/mine/adapter` is `mine`.

    Signs that no name may hold become dashes.
    """
    path = Path(uri.partition("://")[2]) if "://" in uri else Path(uri).resolve()
    name = path.parent.name if path.name == "adapter" and path.parent.name else path.name
    named = _as_name(name, LONGEST_NAME)
    return f"{named}-adapter" if name_problem("adapter", named) else named


def base_label(uri: str) -> str:
    """Return the version name of the base at a path or URI: its last part and a short hash."""
    last = _as_name(uri.rstrip("/").rpartition("/")[2], 40)
    return f"{last}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"


def _as_name(text: str, longest: int) -> str:
    """Return the text with dashes for what no name may hold, and an `x` where nothing is left."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:longest].strip("-_.") or "x"


def check_free(out: Path) -> None:
    """Raise InvalidSpecError unless the folder is new or empty: results are never mixed."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InvalidSpecError(
            f"{out} is in use already", expected="a new or empty folder", do="name another --out"
        )


def _absolute(uri: str) -> str:
    return uri if "://" in uri else str(Path(uri).resolve())
