"""Ports: the protocols through which this library reads and writes external systems.

`trans_peft.edges` implements them for MLflow, S3 and local files, and in memory. All
implementations pass the same contract tests. `Engine`, the port to what runs a model, is
implemented in `trans_peft.validation`. `Platform` bundles one implementation of each other port;
`trans_peft.client.connect` builds it, and every function of `trans_peft.lifecycle` takes it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from trans_peft.domain.adapter import AdapterVersion, AliasState, ManualOverride
from trans_peft.domain.base import BaseVersion, Fingerprint
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Evaluation, EvaluationSummary
from trans_peft.domain.fleet import FamilyAdapters, RegisteredAdapter
from trans_peft.domain.outcome import TransferOutcome
from trans_peft.domain.owners import Owners
from trans_peft.domain.places import Places

__all__ = [
    "AdapterRegistry",
    "ArtifactStore",
    "BaseCatalog",
    "Engine",
    "EngineAnswer",
    "EvaluationStore",
    "Platform",
    "Run",
    "RunLog",
    "StoredFile",
    "TokenScore",
]


@dataclass(frozen=True)
class StoredFile:
    """One file below a prefix.

    Attributes:
        name: The name relative to the prefix.
        size: The size in bytes.
        etag: The store's ETag, which changes with the content.
    """

    name: str
    size: int
    etag: str


class ArtifactStore(Protocol):
    """Files by URI (`s3://bucket/key`, a local path, or `file://path`).

    Every method raises AccessError for a local path that `places` does not allow, and StoreError if
    the store does not respond.
    """

    places: Places
    """The local folders and the hub data sets that may be read."""

    def list(self, prefix_uri: str) -> tuple[StoredFile, ...]:
        """Return every file below the prefix, sorted by name; empty if there are none."""

    def read(
        self, uri: str, *, etag: str | None = None, start: int = 0, stop: int | None = None
    ) -> AbstractContextManager[Iterator[bytes]]:
        """Stream the bytes [start, stop) of one file in chunks; by default the whole file.

        Raises NotFoundError, and IntegrityError if the file has another ETag than `etag`. Raises
        StoreError, at the latest after the last chunk, if the number of bytes differs from the
        listed size. A caller that needs the whole file must therefore read to the end.
        """

    def write(self, uri: str, data: BinaryIO) -> None:
        """Write one file atomically: readers see the whole file or none."""

    def remove(self, uri: str) -> None:
        """Remove one file. Does nothing if there is none."""


class BaseCatalog(Protocol):
    """Base families and their versions."""

    def families(self) -> tuple[str, ...]:
        """Return the names of all base families, sorted, without invalid names."""

    def set_aside(self, family: str | None = None) -> tuple[str, ...]:
        """Return descriptions of catalog entries that cannot be read, each with the reason.

        Without a family: families with an invalid name. With a family: the versions that `versions`
        leaves out.
        """

    def versions(self, family: str) -> tuple[BaseVersion, ...]:
        """Return all versions of a family, ready or not, oldest first.

        Versions that cannot be read are left out (see `set_aside`). Raises NotFoundError.
        """

    def alias(self, family: str, alias: str) -> int | None:
        """Return the number of the version with an alias (`champion`, `serving`), or None."""

    def set_serving(self, base: BaseVersion) -> None:
        """Move `serving` to this version and mark the version as served.

        Only reconcile calls this. Raises InvalidSpecError if the version is not ready.
        """

    def promotion_notes(self, family: str) -> Mapping[int, str]:
        """Return the stored notes about promotions that did not take place, by version number."""

    def note_promotion(self, family: str, number: int, text: str) -> None:
        """Store such a note on a version, ready or not. An empty text removes the note."""

    def make_ready(
        self, draft: BaseVersion, *, fingerprint: Fingerprint, source: str
    ) -> BaseVersion:
        """Register a verified base version and return it with its number, ready.

        `draft` gives the family, the label, the URI, the parent, the manifest's hash and the drift.
        Its `number` is that of a registered version to complete, or 0 for a new one. `source`
        describes the origin for people. If the same label and fingerprint are ready already, that
        version is returned. Raises UploadError if the label is ready with another fingerprint.
        """

    def fingerprint(self, base: BaseVersion) -> Fingerprint:
        """Return the fingerprint of a ready version. Raises NotFoundError."""


class AdapterRegistry(Protocol):
    """Adapters and their versions. No method deletes or changes weights."""

    def adapters(self, family: str) -> tuple[str, ...]:
        """Return the names of the family's live (not retired) adapters, sorted."""

    def registered_name(self, adapter: str) -> str | None:
        """Return the registered name that equals `adapter` if case is ignored, or None.

        The adapter can be of any family, live or not. The cost does not grow with their number.
        """

    def fleet(self, family: str) -> FamilyAdapters:
        """Return all live adapters of a family, each as `adapter` returns it.

        The adapters are read together, in pages of many. `unreadable` has those for which `adapter`
        raises an error, and those with an invalid name or tag, which `adapters` leaves out. An
        adapter that cannot be read does not affect the others.
        """

    def newest(self, family: str) -> str:
        """Return a text that changes when a version of an adapter of the family is registered.

        One request, whatever the number of adapters. Tags and aliases do not change the text.
        """

    def set_aside(self) -> tuple[str, ...]:
        """Return descriptions of adapters of families that do not exist."""

    def adapter(self, name: str) -> RegisteredAdapter:
        """Return one adapter, live or not, with its versions, outcomes and aliases.

        Raises NotFoundError; IntegrityError if a version or an outcome cannot be read.
        """

    def family(self, adapter: str) -> str:
        """Return the family of an adapter, live or not. Raises NotFoundError."""

    def versions(self, adapter: str) -> tuple[AdapterVersion, ...]:
        """Return all versions of one adapter, oldest first.

        Raises NotFoundError, and IntegrityError if a version cannot be read: without it, another
        version could be transferred to new bases by mistake.
        """

    def register(
        self,
        draft: AdapterVersion,
        folder: Path,
        *,
        tags: Mapping[str, str] | None = None,
        scores: Mapping[str, float] | None = None,
    ) -> AdapterVersion:
        """Register the PEFT folder as a new version. The draft's `number` is ignored.

        `tags` and `scores` (in points, by suite) are shown to people.

        If the same weights are registered for the same base, that version is returned. Of several
        such versions the lowest number is returned, and the others are marked as superseded.
        """

    def record(self, outcome: TransferOutcome) -> None:
        """Store an outcome on the version that it registered, or else on its source version.

        An outcome with the verdict `failed` counts as one attempt.
        """

    def outcomes(self, adapter: str) -> tuple[TransferOutcome, ...]:
        """Return the newest outcome per base without evaluations, sorted by base fingerprint."""

    def alias(self, adapter: str, alias: str) -> int | None:
        """Return the number of the version with an alias, or None. Raises NotFoundError."""

    def aliases(self, adapter: str) -> Mapping[str, AliasState]:
        """Return the state of each alias that is set, was set by reconcile, or has a record."""

    def set_alias(self, adapter: str, alias: str, number: int | None) -> bool:
        """Set the alias on a version, or remove it (None), and record that reconcile did.

        Returns False and writes nothing if the alias has a manual override.
        """

    def owns_alias(self, adapter: str, alias: str) -> bool:
        """Return whether the alias has no manual override: it is where reconcile last set it."""

    def record_manual_override(
        self, adapter: str, alias: str, override: ManualOverride | None
    ) -> None:
        """Store the record of a manual override; None removes the record."""

    def download(self, version: AdapterVersion, folder: str | Path) -> Path:
        """Write the version's PEFT files to `folder`, and return it.

        Raises InvalidSpecError unless the folder is new or empty, so that it never holds files of
        two versions. Raises NotFoundError for an unknown version.
        """


class EvaluationStore(Protocol):
    """Evaluations by key, shared by all adapters, workers and commands."""

    def get(self, key: str) -> Evaluation | None:
        """Return the evaluation with that key, or None. Raises IntegrityError."""

    def summary(self, key: str) -> EvaluationSummary | None:
        """Return score and duration of the evaluation with that key, or None. No item is read."""

    def put(self, evaluation: Evaluation, *, labels: Mapping[str, str] | None = None) -> None:
        """Store an evaluation. An evaluation with an existing key is ignored."""


class EngineAnswer(NamedTuple):
    """One generated answer.

    Attributes:
        text: The text before the end token or the first stop string.
        ids: The generated tokens, including the one that ended the answer.
        near_ties: Tokens that would be others if logits changed by 1e-4, if the engine counts them.
    """

    text: str
    ids: Sequence[int]
    near_ties: int = 0


class Sampling(NamedTuple):
    """How the tokens of answers are sampled.

    Attributes:
        temperature: Logits are divided by it.
        top_p: Sum of the probabilities of the most likely tokens, which alone are chosen.
        keys: For each prompt the key of its random numbers, less than 2**128. An answer depends on
            its prompt and its key alone.
    """

    temperature: float
    top_p: float
    keys: Sequence[int]


class TokenScore(NamedTuple):
    """The log-probability of a given token in nats, and whether it is the likeliest token."""

    log_p: float
    is_best: bool


class Engine(Protocol):
    """Runs one model, with or without an adapter, on texts given as token ids.

    The methods are those of lm-evaluation-harness' interface of a model. Prompts and contexts are
    not empty. An engine returns results in the order of its arguments and keeps no state between
    calls. In float32 two engines choose the same tokens, except for near ties. Raises
    EvaluationError if logits are not finite.
    """

    name: str
    """Part of the key of an evaluation, unless it is `DEFAULT_ENGINE`. It contains the version of
    the software if a new version may answer differently."""

    dtype: str
    """Data type of the model's weights, such as "float32"."""

    def answers(  # noqa: PLR0913  the arguments of `generate`
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        end_tokens: frozenset[int] = frozenset(),
        drafts: Sequence[Sequence[int]] | None = None,
        sampling: Sampling | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Sequence[EngineAnswer]:
        """Continue each prompt until an end token, a stop string or `max_new_tokens`.

        `drafts` are expected answers. They change no answer, and an engine may ignore them.
        Decoding is greedy without `sampling`. An engine that cannot sample by keys raises
        InvalidSpecError.
        """

    def likelihoods(
        self,
        questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Sequence[Sequence[float]]:
        """Return the log-likelihood in nats of each continuation of each prompt."""

    def scores(
        self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> Sequence[Sequence[TokenScore]]:
        """Return a score for each of the given tokens of each (context, tokens)."""


class Run(Protocol):
    """One recorded run, such as a training."""

    id: str

    def params(self, values: Mapping[str, object]) -> None:
        """Record the parameters of the run."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics at a step."""

    def dataset(self, name: str, data: DataSource) -> None:
        """Record the pinned data that the run is trained on."""

    def file(self, path: Path, folder: str = "") -> None:
        """Store a file with the run."""


class RunLog(Protocol):
    """Records runs."""

    def run(self, name: str, *, tags: Mapping[str, str]) -> AbstractContextManager[Run]:
        """Record one run. It is marked as failed if the block raises an error."""


@dataclass(frozen=True)
class Platform:
    """One implementation of each port, and the settings of this worker.

    Attributes:
        store: Files by URI.
        catalog: Base families and their versions.
        registry: Adapters and their versions.
        evaluations: Stored evaluations.
        runs: Records of training runs.
        work_dir: A folder of this worker alone, for copies of bases, checkpoints and downloads. All
            of it can be downloaded or computed again.
        cache_bytes: The limit for copies of bases in bytes; None means the size of the disk.
        may_lack: Names of the guards of the sandbox for generated code that may be missing here.
        owners: The places and the signing keys from which each base family accepts versions.
        checkpoints_uri: Prefix for the checkpoints of unfinished training; empty: on the disk only.
        suites_uri: Prefix for the items of suites that pinning writes; empty: none can be written.
        vllm: The Python environment with vLLM; None: that of this process.
        on_base_copy: Called at each use of a base with whether this worker had a copy of it.
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
    checkpoints_uri: str = ""
    suites_uri: str = ""
    vllm: Path | None = None
    on_base_copy: Callable[[bool], None] = lambda found: None
