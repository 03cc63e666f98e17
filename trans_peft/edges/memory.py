"""Every port in memory, for notebooks and tests. They pass the contract tests of the real ports.

Methods that end in `_manually` do what a person does in MLflow's pages. No port has them.
"""

import hashlib
import itertools
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from trans_peft.domain.adapter import AdapterVersion, AliasState, ManualOverride
from trans_peft.domain.base import BaseVersion, Fingerprint
from trans_peft.domain.conventions import SERVING_ALIAS
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Evaluation, EvaluationSummary
from trans_peft.domain.fleet import FamilyAdapters, RegisteredAdapter
from trans_peft.domain.names import check_case, check_names, name_problem, quoted
from trans_peft.domain.outcome import TransferOutcome
from trans_peft.domain.places import Places
from trans_peft.errors import (
    IntegrityError,
    InvalidSpecError,
    NotFoundError,
    UploadError,
    unknown_name,
)
from trans_peft.files import check_unused
from trans_peft.ports import Platform, StoredFile

__all__ = [
    "MemoryCatalog",
    "MemoryEvaluations",
    "MemoryRegistry",
    "MemoryRun",
    "MemoryRunLog",
    "MemoryStore",
    "memory_platform",
]


def memory_platform(work_dir: Path) -> Platform:
    """Return a platform whose contents exist in memory only."""
    return Platform(
        MemoryStore(),
        MemoryCatalog(),
        MemoryRegistry(),
        MemoryEvaluations(),
        MemoryRunLog(),
        work_dir,
    )


class MemoryStore:
    """`ArtifactStore` in a dictionary, for any URI scheme. Reads in chunks of `chunk_bytes`."""

    def __init__(self, chunk_bytes: int = 1 << 20) -> None:
        self.places = Places()
        self._files: dict[str, bytes] = {}
        self._chunk_bytes = chunk_bytes

    def list(self, prefix_uri: str) -> tuple[StoredFile, ...]:
        """Return every file below the prefix, sorted by name."""
        prefix = prefix_uri.rstrip("/") + "/"
        return tuple(
            StoredFile(uri.removeprefix(prefix), len(data), _etag(data))
            for uri, data in sorted(self._files.items())
            if uri.startswith(prefix)
        )

    def read(
        self, uri: str, *, etag: str | None = None, start: int = 0, stop: int | None = None
    ) -> AbstractContextManager[Iterator[bytes]]:
        """Stream the bytes [start, stop) of one file. Raises NotFoundError, IntegrityError."""
        return self._read(uri, etag, start, stop)

    @contextmanager
    def _read(
        self, uri: str, etag: str | None, start: int, stop: int | None
    ) -> Iterator[Iterator[bytes]]:
        if uri not in self._files:
            raise NotFoundError(f"there is no file {uri}")
        data = self._files[uri]
        if etag is not None and _etag(data) != etag:
            raise IntegrityError(f"{uri} changed", expected=f"ETag {etag}", found=_etag(data))
        data, size = data[start:stop], self._chunk_bytes
        yield (data[at : at + size] for at in range(0, len(data), size))

    def write(self, uri: str, data: BinaryIO) -> None:
        """Write one file."""
        self._files[uri] = data.read()

    def remove(self, uri: str) -> None:
        """Remove one file. Does nothing if there is none."""
        self._files.pop(uri, None)


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


class MemoryCatalog:
    """`BaseCatalog` in dictionaries."""

    def __init__(self) -> None:
        self._versions: dict[str, list[BaseVersion]] = {}
        self._aliases: dict[tuple[str, str], int] = {}
        self._fingerprints: dict[str, Fingerprint] = {}
        self._sources: dict[tuple[str, int], str] = {}
        self._notes: dict[str, dict[int, str]] = {}
        self._odd: set[str] = set()
        self._lock = threading.Lock()

    def families(self) -> tuple[str, ...]:
        """Return the names of all base families, sorted, without invalid names."""
        return tuple(sorted(self._versions))

    def set_aside(self, family: str | None = None) -> tuple[str, ...]:
        """Return descriptions of the families with an invalid name."""
        names = sorted(self._odd) if family is None else ()
        return tuple(
            f"the base family {quoted(name)}: {name_problem('the name', name)}" for name in names
        )

    def versions(self, family: str) -> tuple[BaseVersion, ...]:
        """Return all versions of a family, ready or not, oldest first. Raises NotFoundError."""
        check_names("the catalog", family=family)
        if family not in self._versions:
            raise unknown_name("base family", family, self.families())
        return tuple(self._versions[family])

    def alias(self, family: str, alias: str) -> int | None:
        """Return the number of the version with an alias, or None. Raises NotFoundError."""
        self.versions(family)
        return self._aliases.get((family, alias))

    def set_serving(self, base: BaseVersion) -> None:
        """Move `serving` to this version. Raises InvalidSpecError if it is not ready."""
        known = next((b for b in self.versions(base.family) if b.number == base.number), None)
        if known is None:
            raise NotFoundError(f"there is no version number {base.number} of {base.family}")
        if not known.ready:
            raise InvalidSpecError(f"{known} cannot serve, because it is not ready")
        self._versions[base.family] = [
            replace(b, served=True) if b.number == base.number else b
            for b in self._versions[base.family]
        ]
        self._aliases[base.family, SERVING_ALIAS] = base.number

    def promotion_notes(self, family: str) -> Mapping[int, str]:
        """Return the stored notes about promotions that did not take place."""
        return dict(self._notes.get(family, {}))

    def note_promotion(self, family: str, number: int, text: str) -> None:
        """Store such a note on a version. An empty text removes the note."""
        if not any(base.number == number for base in self.versions(family)):
            raise NotFoundError(f"there is no version number {number} of {family}")
        notes = self._notes.setdefault(family, {})
        notes.pop(number, None)
        if text:
            notes[number] = text

    def make_ready(
        self, draft: BaseVersion, *, fingerprint: Fingerprint, source: str
    ) -> BaseVersion:
        """Register a verified version, or complete the registered one with the draft's number."""
        family, version, number = draft.family, draft.version, draft.number or None
        with self._lock:
            check_case("the family", family, self._versions)
            labels = [known.version for known in self._versions.get(family, ())]
            check_case("the version", version, labels)
            versions = self._versions.setdefault(family, [])
            if number is not None and not any(b.number == number for b in versions):
                raise NotFoundError(f"there is no version number {number} of {family}")
            for known in versions:
                if not known.ready or (known.version != version and known.number != number):
                    continue
                if (known.version, known.fingerprint_sha256) != (version, fingerprint.digest):
                    raise UploadError(
                        f"{known} is ready already with other content",
                        expected=f"{known.version}, fingerprint {known.fingerprint_sha256}",
                        found=f"{version}, fingerprint {fingerprint.digest}",
                        do="publish it under a new version",
                    )
                if number is not None and known.number != number:
                    versions[:] = [b for b in versions if b.number != number]
                return known
            if number is None:
                number = self._next_number(family)
                versions.append(replace(draft, number=number))
            ready = replace(draft, number=number, fingerprint_sha256=fingerprint.digest, ready=True)
            versions[:] = [ready if b.number == number else b for b in versions]
            self._fingerprints[fingerprint.digest] = fingerprint
            self._sources[family, number] = source
            return ready

    def fingerprint(self, base: BaseVersion) -> Fingerprint:
        """Return the fingerprint of a ready version. Raises NotFoundError."""
        if base.fingerprint_sha256 not in self._fingerprints:
            raise NotFoundError(f"{base} has no fingerprint, because it was never made ready")
        return self._fingerprints[base.fingerprint_sha256]

    def register_manually(self, family: str, uri: str) -> int:
        """Register a version with a URI alone, as a person does in MLflow."""
        if name_problem("the name", family):
            self._odd.add(family)
            return 1
        with self._lock:
            number = self._next_number(family)
            versions = self._versions.setdefault(family, [])
            versions.append(BaseVersion(family, str(number), uri, number))
            return number

    def set_alias_manually(self, family: str, alias: str, number: int | None) -> None:
        """Move or remove an alias as a person does."""
        _move(self._aliases, (family, alias), number)

    def _next_number(self, family: str) -> int:
        return max((b.number for b in self._versions.get(family, ())), default=0) + 1


class MemoryRegistry:
    """`AdapterRegistry` in dictionaries, including the files of the PEFT folders."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, int], dict[str, bytes]] = {}
        self._families: dict[str, str] = {}
        self._retired: set[str] = set()
        self._owners: dict[str, str] = {}
        self._versions: dict[str, list[AdapterVersion]] = {}
        self._tags: dict[tuple[str, int], dict[str, str]] = {}
        # Each by name of the adapter, then by fingerprint of the base or by alias.
        self._outcomes: defaultdict[str, dict[str, TransferOutcome]] = defaultdict(dict)
        self._aliases: defaultdict[str, dict[str, int]] = defaultdict(dict)
        self._set_by_reconcile: defaultdict[str, dict[str, int | None]] = defaultdict(dict)
        self._overrides: defaultdict[str, dict[str, ManualOverride]] = defaultdict(dict)
        self._lock = threading.Lock()

    def adapters(self, family: str) -> tuple[str, ...]:
        """Return the names of the family's live adapters, sorted."""
        return tuple(
            sorted(
                name
                for name, its_family in self._families.items()
                if its_family == family and name not in self._retired
            )
        )

    def registered_name(self, adapter: str) -> str | None:
        """Return the registered name that equals `adapter` if case is ignored, or None."""
        return next((name for name in self._families if name.lower() == adapter.lower()), None)

    def fleet(self, family: str) -> FamilyAdapters:
        """Return all live adapters of a family. All can be read."""
        return FamilyAdapters(tuple(map(self.adapter, self.adapters(family))))

    def newest(self, family: str) -> str:
        """Return the number of versions of the family's adapters."""
        return str(
            sum(len(self._versions[name]) for name, its in self._families.items() if its == family)
        )

    def set_aside(self) -> tuple[str, ...]:
        """Return nothing: `register` accepts valid names only."""
        return ()

    def adapter(self, name: str) -> RegisteredAdapter:
        """Return one adapter with its versions, outcomes and aliases. Raises NotFoundError."""
        return RegisteredAdapter(
            name=name,
            family=self.family(name),
            versions=self.versions(name),
            outcomes=self.outcomes(name),
            aliases=self.aliases(name),
            is_live=name not in self._retired,
            owner=self._owners.get(name, ""),
        )

    def family(self, adapter: str) -> str:
        """Return the family of an adapter, live or not. Raises NotFoundError."""
        self.versions(adapter)
        return self._families[adapter]

    def versions(self, adapter: str) -> tuple[AdapterVersion, ...]:
        """Return all versions of one adapter, oldest first. Raises NotFoundError."""
        if adapter not in self._versions:
            raise unknown_name("adapter", adapter, self._versions)
        return tuple(self._versions[adapter])

    def register(
        self,
        draft: AdapterVersion,
        folder: Path,
        *,
        tags: Mapping[str, str] | None = None,
        scores: Mapping[str, float] | None = None,
    ) -> AdapterVersion:
        """Register the PEFT folder as a new version, or return the existing one."""
        with self._lock:
            check_case("the adapter", draft.adapter, self._families)
            family = self._families.setdefault(draft.adapter, draft.base.family)
            if family != draft.base.family:
                raise InvalidSpecError(
                    f"the adapter {draft.adapter!r} belongs to another family",
                    expected=family,
                    found=draft.base.family,
                    do="give the new adapter another name",
                )
            versions = self._versions.setdefault(draft.adapter, [])
            for known in versions:
                if _bytes_and_base(known) == _bytes_and_base(draft):
                    return known
            version = replace(draft, number=len(versions) + 1)
            self._files[version.adapter, version.number] = {
                path.relative_to(folder).as_posix(): path.read_bytes()
                for path in Path(folder).rglob("*")
                if path.is_file()
            }
            self._tags[version.adapter, version.number] = dict(tags or {})
            versions.append(version)
            return version

    def tags(self, version: AdapterVersion) -> Mapping[str, str]:
        """Return the tags that were passed to `register`."""
        return self._tags[version.adapter, version.number]

    def record(self, outcome: TransferOutcome) -> None:
        """Store an outcome on the version that it registered, or else on its source version."""
        with self._lock:
            versions = self.versions(outcome.adapter)
            number = outcome.new_number or outcome.source_number
            if not any(version.number == number for version in versions):
                raise NotFoundError(f"there is no version {number} of {outcome.adapter}")
            base = outcome.base.fingerprint_sha256
            previous = self._outcomes[outcome.adapter].get(base)
            self._outcomes[outcome.adapter][base] = outcome.counted_after(previous)
            if outcome.new_number is not None:
                self._versions[outcome.adapter] = [
                    replace(
                        version,
                        state=replace(
                            version.state,
                            verdict=outcome.verdict.value,
                            verdict_key=outcome.verdict_key,
                        ),
                    )
                    if version.number == outcome.new_number
                    else version
                    for version in versions
                ]

    def outcomes(self, adapter: str) -> tuple[TransferOutcome, ...]:
        """Return the newest outcome per base without evaluations, sorted by base fingerprint."""
        self.versions(adapter)
        return tuple(
            replace(outcome, evaluations=())
            for _, outcome in sorted(self._outcomes[adapter].items(), key=lambda item: item[0])
        )

    def alias(self, adapter: str, alias: str) -> int | None:
        """Return the number of the version with an alias, or None. Raises NotFoundError."""
        self.versions(adapter)
        return self._aliases[adapter].get(alias)

    def aliases(self, adapter: str) -> Mapping[str, AliasState]:
        """Return the state of each alias that is set, was set by reconcile, or has a record."""
        self.versions(adapter)
        known = (self._aliases, self._set_by_reconcile, self._overrides)
        return {
            alias: self._alias_state(adapter, alias)
            for alias in set().union(*(aliases[adapter] for aliases in known))
        }

    def set_alias(self, adapter: str, alias: str, number: int | None) -> bool:
        """Set or remove (None) the alias. Returns False if it has a manual override."""
        if number is not None and number not in [v.number for v in self.versions(adapter)]:
            raise NotFoundError(f"there is no version {number} of {adapter}")
        if self._alias_state(adapter, alias).is_manual:
            return False
        _move(self._aliases[adapter], alias, number)
        self._set_by_reconcile[adapter][alias] = number
        return True

    def owns_alias(self, adapter: str, alias: str) -> bool:
        """Return whether the alias is where reconcile last set it."""
        return not self._alias_state(adapter, alias).is_manual

    def record_manual_override(
        self, adapter: str, alias: str, override: ManualOverride | None
    ) -> None:
        """Store the record of a manual override; None removes the record."""
        self.versions(adapter)
        self._overrides[adapter].pop(alias, None)
        if override is not None:
            self._overrides[adapter][alias] = override

    def _alias_state(self, adapter: str, alias: str) -> AliasState:
        stands = self._aliases[adapter].get(alias)
        return AliasState(
            stands,
            is_manual=stands != self._set_by_reconcile[adapter].get(alias),
            recorded=self._overrides[adapter].get(alias),
        )

    def download(self, version: AdapterVersion, folder: str | Path) -> Path:
        """Write the version's PEFT files to a new or empty folder and return its path."""
        folder = Path(folder)
        check_unused(folder)
        if (version.adapter, version.number) not in self._files:
            raise NotFoundError(f"there is no {version}")
        for name, data in self._files[version.adapter, version.number].items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return folder

    def retire_manually(self, adapter: str) -> None:
        """Tag an adapter as retired, as a person does."""
        self._retired.add(adapter)

    def set_owner_manually(self, adapter: str, owner: str) -> None:
        """Tag an adapter with its owner, as a person does."""
        self._owners[adapter] = owner

    def set_alias_manually(self, adapter: str, alias: str, number: int | None) -> None:
        """Move or remove an alias, as a person does. It then has a manual override."""
        _move(self._aliases[adapter], alias, number)


def _bytes_and_base(version: AdapterVersion) -> tuple[str, str]:
    return version.weights_sha256, version.base.fingerprint_sha256


def _move(aliases: dict[Any, int], key: Any, number: int | None) -> None:
    if number is None:
        aliases.pop(key, None)
    else:
        aliases[key] = number


class MemoryEvaluations:
    """`EvaluationStore` in a dictionary."""

    def __init__(self) -> None:
        self._evaluations: dict[str, Evaluation] = {}

    def get(self, key: str) -> Evaluation | None:
        """Return the evaluation with that key, or None."""
        return self._evaluations.get(key)

    def summary(self, key: str) -> EvaluationSummary | None:
        """Return score and duration of the evaluation with that key, or None."""
        found = self._evaluations.get(key)
        return None if found is None else EvaluationSummary(found.score, found.seconds)

    def put(self, evaluation: Evaluation, *, labels: Mapping[str, str] | None = None) -> None:
        """Store an evaluation. An evaluation with an existing key is ignored."""
        self._evaluations.setdefault(evaluation.key, evaluation)


@dataclass
class MemoryRun:
    """One recorded run."""

    id: str
    name: str
    tags: dict[str, str]
    status: Literal["running", "finished", "failed"] = "running"
    recorded_params: dict[str, object] = field(default_factory=dict)
    recorded_metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    datasets: dict[str, DataSource] = field(default_factory=dict)

    def params(self, values: Mapping[str, object]) -> None:
        """Record the parameters of the run."""
        self.recorded_params.update(values)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics at a step."""
        for name, value in values.items():
            self.recorded_metrics.setdefault(name, []).append((step, value))

    def dataset(self, name: str, data: DataSource) -> None:
        """Record the data that the run is trained on."""
        self.datasets[name] = data

    def file(self, path: Path, folder: str = "") -> None:
        """Store a file with the run."""
        self.files[f"{folder}/{path.name}" if folder else path.name] = path.read_bytes()


class MemoryRunLog:
    """`RunLog` in a list."""

    def __init__(self) -> None:
        self.runs: list[MemoryRun] = []
        self._ids = itertools.count(1)

    @contextmanager
    def run(self, name: str, *, tags: Mapping[str, str]) -> Iterator[MemoryRun]:
        """Record one run. It is marked as failed if the block raises an error."""
        run = MemoryRun(f"run-{next(self._ids)}", name, dict(tags))
        self.runs.append(run)
        try:
            yield run
        except BaseException:
            run.status = "failed"
            raise
        run.status = "finished"
