"""The ports of the command line, and its cache between commands.

The state folder holds evaluations by key, fingerprints by the names, sizes and ETags of the files
they were computed from, copies of bases from buckets, checkpoints of unfinished training, and the
items of suites that are tasks of lm-evaluation-harness. All of it can be deleted; later commands
then take longer.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from trans_peft.artifacts import download_files
from trans_peft.cli.environment import missing_guards, vllm_environment
from trans_peft.cli.files import write_json
from trans_peft.cli.show import ProgressDisplay
from trans_peft.domain.base import BaseVersion, Fingerprint
from trans_peft.domain.evaluation import Evaluation, EvaluationSummary
from trans_peft.domain.identity import content_sha256
from trans_peft.domain.names import LONGEST_NAME, name_problem
from trans_peft.edges.memory import MemoryCatalog, MemoryRegistry, MemoryRunLog
from trans_peft.edges.stores import SchemeStore
from trans_peft.errors import InvalidSpecError, NotFoundError
from trans_peft.ports import Platform

__all__ = [
    "DOWNLOADED_FROM",
    "LOCAL",
    "EvaluationFolder",
    "Workspace",
    "adapter_name",
    "base_label",
]

DOWNLOADED_FROM: dict[Path, str] = {}
"""The URI of each adapter that was copied from a bucket, by its folder. Errors name the URI."""

LOCAL = "local"
"""The family of bases in commands that take no family."""


class EvaluationFolder:
    """An `EvaluationStore` of JSON files, one per evaluation, named by its key."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> Evaluation | None:
        """Return the evaluation with that key, or None if the folder has none that is readable."""
        from pydantic import TypeAdapter, ValidationError

        path = self._path(key)
        if not path.is_file():
            return None
        try:
            found = TypeAdapter(Evaluation).validate_json(path.read_bytes())
        except ValidationError:  # the cache may be damaged; the evaluation is computed again
            return None
        return found if found.key == key else None

    def summary(self, key: str) -> EvaluationSummary | None:
        """Return score and duration of the evaluation with that key, or None."""
        found = self.get(key)
        return None if found is None else EvaluationSummary(found.score, found.seconds)

    def put(self, evaluation: Evaluation, *, labels: Mapping[str, str] | None = None) -> None:
        """Store an evaluation. Changes nothing if there is one with the same key."""
        if self.get(evaluation.key) is None:
            write_json(self._path(evaluation.key), evaluation)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.json"


@dataclass(frozen=True)
class Workspace:
    """A platform of files and memory, and its progress display."""

    platform: Platform
    progress: ProgressDisplay

    @classmethod
    def at(cls, state: Path, progress: ProgressDisplay) -> "Workspace":
        """Open a workspace with its cache in the folder `state`.

        The workspace may read any local path that its user may read. The environment variable
        TRANS_PEFT_SANDBOX_MAY_LACK lists the guards of the sandbox for generated code that may be
        missing on this machine, and TRANS_PEFT_VLLM is the Python environment with vLLM.
        """
        state = state.resolve()
        platform = Platform(
            store=SchemeStore(),
            catalog=MemoryCatalog(),
            registry=MemoryRegistry(),
            evaluations=EvaluationFolder(state / "evaluations"),
            runs=MemoryRunLog(),
            work_dir=state,
            suites_uri=str(state / "suites"),
            may_lack=missing_guards(),
            vllm=vllm_environment(),
        )
        return cls(platform, progress)

    def base(self, named: str, family: str) -> BaseVersion:
        """Fingerprint a base and register it under a version label made from its path.

        Raises UploadError if its files do not match the model that loads them.
        """
        uri = _absolute(named)
        fingerprint = self.fingerprint(uri)
        self._check(uri, fingerprint)
        if "://" not in uri:
            self._use_in_place(Path(uri), fingerprint)
        return self.platform.catalog.make_ready(
            BaseVersion(family, base_label(uri), uri, 0),
            fingerprint=fingerprint,
            source="command line",
        )

    def base_trained_on(self, named: str, adapter: Path) -> BaseVersion:
        """Return `base(named, LOCAL)`, compared with the base that the adapter's config records.

        The config records a fingerprint, or else a name. A local folder of that name is
        fingerprinted; any other name is shown as a note. Raises InvalidSpecError for another base.
        """
        from trans_peft.transfer.peft_folder import read_peft_folder

        base, config = self.base(named, LOCAL), read_peft_folder(adapter)
        name = str(config.config.get("base_model_name_or_path") or "")
        recorded = config.base_fingerprint_sha256
        if recorded is None and name and Path(name, "config.json").is_file():
            recorded = self.fingerprint(name).digest
        if recorded is None:
            self.progress.print_line(
                f"note: the adapter records {f'the base {name!r}' if name else 'no base'}, which "
                f"cannot be compared with {named}"
            )
        elif recorded != base.fingerprint_sha256:
            raise InvalidSpecError(
                f"the adapter was trained on another base than {named}",
                expected=f"the base {name or 'that adapter_config.json records'}, fingerprint "
                f"{recorded}",
                found=f"{named}, fingerprint {base.fingerprint_sha256}",
                do="pass the base that the adapter was trained on as --old",
            )
        return base

    def fingerprint(self, uri: str) -> Fingerprint:
        """Return a base's fingerprint, from the cache unless one of its files changed."""
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
            on_progress=lambda done, total: self.progress.update(
                f"reading {uri}", done, total, "B"
            ),
        )
        write_json(known, found)
        return found

    def adapter(self, uri: str) -> Path:
        """Return the folder of a PEFT adapter, downloaded if it is in a bucket.

        Raises NotFoundError if there are no files, and AdapterError if they are no PEFT folder.
        """
        from trans_peft.transfer.peft_folder import read_peft_folder

        if "://" not in uri:
            return read_peft_folder(Path(uri)).path
        files = [file for file in self.platform.store.list(uri) if "/" not in file.name]
        if not files:
            raise NotFoundError(f"there are no files at {uri}", expected="a PEFT folder")
        name = hashlib.sha256(repr((uri, files)).encode()).hexdigest()
        folder = self.platform.work_dir / "adapters" / name
        folder.mkdir(parents=True, exist_ok=True)
        DOWNLOADED_FROM[folder] = uri
        used = [file for file in files if file.name.endswith((".json", ".safetensors", ".jinja"))]
        download_files(uri, used, self.platform.store, folder)
        return read_peft_folder(folder).path

    def _check(self, uri: str, fingerprint: Fingerprint) -> None:
        """Check a base against the model that loads it, once for each content."""
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
        """Link a local folder into the cache of bases, so that it is not copied."""
        link = self.platform.work_dir / "bases" / fingerprint.digest
        if link.is_symlink():
            link.unlink()
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(folder, target_is_directory=True)


def adapter_name(uri: str) -> str:
    """Return the default name of the adapter in a folder: `mine` for `runs/mine/adapter`.

    Characters that a name cannot have become dashes.
    """
    path = Path(uri.partition("://")[2]) if "://" in uri else Path(uri).resolve()
    name = path.parent.name if path.name == "adapter" and path.parent.name else path.name
    named = _as_name(name, LONGEST_NAME)
    return f"{named}-adapter" if name_problem("adapter", named) else named


def base_label(uri: str) -> str:
    """Return the version label of the base at a path or URI: its last part and a short hash."""
    last = _as_name(uri.rstrip("/").rpartition("/")[2], 40)
    return f"{last}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"


def _as_name(text: str, longest: int) -> str:
    """Return the text with dashes for invalid characters, or `x` if no character is valid."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:longest].strip("-_.") or "x"


def _absolute(uri: str) -> str:
    return uri if "://" in uri else str(Path(uri).resolve())
