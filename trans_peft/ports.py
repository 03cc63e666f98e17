"""The doors through which this library touches the outside, as Protocols.

Each has an in-memory twin in `trans_peft.edges.memory` that passes the same contract tests as the
real one. `Platform` bundles them: the composition root builds one and hands it to a verb of
`trans_peft.lifecycle`.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from trans_peft.domain.adapter import AdapterVersion, AliasState, ManualOverride
from trans_peft.domain.base import BaseVersion, Fingerprint
from trans_peft.domain.evaluation import Evaluation
from trans_peft.domain.fleet import RegisteredAdapter
from trans_peft.domain.outcome import TransferOutcome
from trans_peft.domain.owners import Owners
from trans_peft.domain.places import Places

__all__ = [
    "AdapterRegistry",
    "ArtifactStore",
    "BaseCatalog",
    "EvaluationStore",
    "Platform",
    "Run",
    "RunLog",
    "StoredFile",
]


@dataclass(frozen=True)
class StoredFile:
    """One object under a prefix: its name relative to it, its size in bytes, its store's ETag."""

    name: str
    size: int
    etag: str


class ArtifactStore(Protocol):
    """Bytes under a URI (`s3://bucket/key`, a path, or `file://path`).

    Every method raises AccessError for a local path outside of `places`.
    """

    places: Places
    """The local folders and the hub data sets that may be read."""

    def list(self, prefix_uri: str) -> tuple[StoredFile, ...]:
        """Return every file below the prefix, sorted by name. Empty where there is nothing."""

    def read(
        self, uri: str, *, etag: str | None = None, start: int = 0, stop: int | None = None
    ) -> AbstractContextManager[Iterator[bytes]]:
        """Stream the bytes [start, stop) of one file (all of it) in chunks.

        NotFoundError; IntegrityError if its ETag is another; StoreError, at the latest after the
        last chunk, if fewer or other bytes arrive than the store lists. A caller that needs the
        whole file must read to the end.
        """

    def write(self, uri: str, data: BinaryIO) -> None:
        """Write one file, whole or not at all."""


class BaseCatalog(Protocol):
    """Base families and their versions."""

    def families(self) -> tuple[str, ...]:
        """Return the names of all base families, sorted; names that break the rule left out."""

    def set_aside(self, family: str | None = None) -> tuple[str, ...]:
        """Return what stands in the catalog and cannot be read, a line each, with the reason.

        Without a family: registered families whose name breaks the rule. With one: its versions
        that `versions` leaves out.
        """

    def versions(self, family: str) -> tuple[BaseVersion, ...]:
        """Return all versions of a family, ready or not, oldest first. NotFoundError.

        What cannot be read is left out: see `set_aside`.
        """

    def alias(self, family: str, alias: str) -> int | None:
        """Return the number of the version that carries the alias (`champion`, `serving`)."""

    def set_serving(self, base: BaseVersion) -> None:
        """Move `serving` to this version and remember that it served; reconcile alone does.

        Not ready: InvalidSpecError.
        """

    def promotion_notes(self, family: str) -> Mapping[int, str]:
        """Return what stands on versions, by number, about why `champion` there does not serve."""

    def note_promotion(self, family: str, number: int, text: str) -> None:
        """Write such a note on a version, ready or not; an empty one takes it away."""

    def make_ready(
        self,
        family: str,
        version: str,
        uri: str,
        *,
        fingerprint: Fingerprint,
        parent: str | None,
        source: str,
        number: int | None = None,
        manifest_sha256: str = "",
    ) -> BaseVersion:
        """Register a verified version, or complete the one with that `number`; `ready` last.

        The same family, version and fingerprint again returns the version that is there. The same
        version with another fingerprint is an UploadError.
        """

    def fingerprint(self, base: BaseVersion) -> Fingerprint:
        """Return the whole fingerprint of a ready version."""


class AdapterRegistry(Protocol):
    """Adapters and their versions. No method deletes or rewrites bytes."""

    def adapters(self, family: str) -> tuple[str, ...]:
        """Return the names of the family's live (not retired) adapters, sorted."""

    def set_aside(self, family: str | None = None) -> tuple[str, ...]:
        """Return what `adapters` leaves out because it cannot be read, a line each.

        With a family: registered models that claim to be adapters of it. Without one: those that
        claim a family that does not exist.
        """

    def adapter(self, name: str) -> RegisteredAdapter:
        """Return one adapter, live or not, with its versions, outcomes and aliases.

        Raises NotFoundError; IntegrityError if a version or an outcome cannot be read.
        """

    def family(self, adapter: str) -> str:
        """Return the family of an adapter, live or not. NotFoundError."""

    def versions(self, adapter: str) -> tuple[AdapterVersion, ...]:
        """Return all versions of one adapter, oldest first.

        NotFoundError; IntegrityError if one of them cannot be read: which version would be carried
        to new bases could then be another one.
        """

    def register(
        self, draft: AdapterVersion, folder: Path, *, tags: Mapping[str, str] | None = None
    ) -> AdapterVersion:
        """Register the PEFT folder as a new version; the draft's `number` is ignored.

        The same adapter, weights and base again returns the version that is there (the lowest;
        any other is marked superseded).
        """

    def record(self, outcome: TransferOutcome) -> None:
        """Keep an outcome: on the version it made, or on its source where it made none.

        An outcome whose verdict is `failed` counts as one attempt.
        """

    def outcomes(self, adapter: str) -> tuple[TransferOutcome, ...]:
        """Return the newest outcome per base (evaluations left out), by base fingerprint."""

    def alias(self, adapter: str, alias: str) -> int | None:
        """Return the number of the version that carries the alias."""

    def aliases(self, adapter: str) -> Mapping[str, AliasState]:
        """Return every alias of the adapter that is set, or was set by us or recorded once."""

    def set_alias(self, adapter: str, alias: str, number: int | None) -> bool:
        """Move the alias to a version, or take it away (None), and remember that we did.

        Where it stands by a person's hand nothing is written: False.
        """

    def owns_alias(self, adapter: str, alias: str) -> bool:
        """Whether the alias stands as we last set it (or nobody ever did). False: a person's."""

    def record_manual_override(self, adapter: str, alias: str, hand: ManualOverride | None) -> None:
        """Write down what a person did to the alias, for people to see (None: no longer so)."""

    def download(self, version: AdapterVersion, folder: Path) -> Path:
        """Write the version's PEFT folder below `folder` and return where it is."""


class EvaluationStore(Protocol):
    """Evaluations by key: computed once, shared by everybody."""

    def get(self, key: str) -> Evaluation | None:
        """Return the evaluation with that key, or None."""

    def put(self, evaluation: Evaluation, *, labels: Mapping[str, str] | None = None) -> None:
        """Keep an evaluation. The same key again changes nothing."""


class Run(Protocol):
    """One run of something that is worth looking at while it runs."""

    id: str

    def params(self, values: Mapping[str, object]) -> None:
        """Record what it was started with."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record figures at a step."""

    def file(self, path: Path, folder: str = "") -> None:
        """Attach a file."""


class RunLog(Protocol):
    """Where runs are recorded."""

    def run(self, name: str, *, tags: Mapping[str, str]) -> AbstractContextManager[Run]:
        """Record one run; it is marked failed where the block raises."""


@dataclass(frozen=True)
class Platform:
    """Every port, and the folder in which this worker keeps what it can fetch again.

    `cache_bytes` bounds its copies of bases (None: the disk alone does). `may_lack` names the
    guards of the sandbox for generated code that this worker may lack; its operator decides.
    `owners` says from where, and with whose signature, each base family takes its versions.
    """

    store: ArtifactStore
    catalog: BaseCatalog
    registry: AdapterRegistry
    evaluations: EvaluationStore
    runs: RunLog
    work_dir: Path
    cache_bytes: int | None = None
    may_lack: frozenset[str] = frozenset()
    owners: Owners = Owners()  # noqa: RUF009  frozen
