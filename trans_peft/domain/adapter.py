"""Adapters: one registered version of one, and which version is carried to new bases."""

from collections.abc import Sequence
from dataclasses import dataclass

from trans_peft.domain.base import serving_alias
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.names import check_names
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.domain.recovery import RecoveryStrategy
from trans_peft.domain.spec import AdapterSpec
from trans_peft.errors import NotFoundError

__all__ = [
    "AdapterSpec",
    "AdapterVersion",
    "AliasState",
    "ManualOverride",
    "VersionState",
    "source_version",
    "version_trained_on",
]


@dataclass(frozen=True)
class VersionState:
    """What may change about a registered version: its verdict. The bytes never do."""

    verdict: str | None = None
    verdict_key: str | None = None
    superseded: bool = False


@dataclass(frozen=True)
class ManualOverride:
    """What a person did to an alias, for the record.

    `number` is where the alias was found (None: taken away), `wanted` where the verdict would have
    it, `why` that verdict in words. `first_seen` is when reconcile noticed (ISO 8601, UTC). Without
    authentication MLflow knows no user, so `by` stays unknown.
    """

    number: int | None
    wanted: int | None
    why: str
    first_seen: str
    by: str = "unknown"

    def __str__(self) -> str:
        stands = "taken away" if self.number is None else f"set on version {self.number}"
        wanted = "no version" if self.wanted is None else f"version {self.wanted}"
        return f"{stands} by hand (seen {self.first_seen}); by verdict {wanted}: {self.why}"


@dataclass(frozen=True)
class AliasState:
    """Where one alias of an adapter stands, and whose word that is.

    `manual`: not where we last put it, so a person's word. `unfinished`: a write of ours was cut
    off; to set the alias again finishes it. `recorded`: what stands in the registry about the hand.
    """

    number: int | None = None
    manual: bool = False
    unfinished: bool = False
    recorded: ManualOverride | None = None


@dataclass(frozen=True)
class AdapterVersion:
    """The bytes of one adapter on one base: immutable once registered.

    `number` is the registry's. `base_*` is the base these bytes are bound to, `trained_on_*` the
    base they were trained on: the same for a trained version, different for a transferred one,
    whose `transferred_from` is the number of the version it was made from. `recipe_sha256` is empty
    for an adopted adapter, and `recipe` missing: nobody knows how it was trained. `made_by`: which
    rung of the ladder made these bytes of those of `transferred_from`.
    """

    adapter: str
    number: int
    family: str
    base_version: str
    base_fingerprint_sha256: str
    trained_on_version: str
    trained_on_fingerprint_sha256: str
    weights_sha256: str
    method: str
    suites: tuple[Suite, ...]
    transferred_from: int | None = None
    recipe_sha256: str = ""
    run_id: str | None = None
    state: VersionState = VersionState()
    recipe: TrainingRecipe | None = None
    made_by: RecoveryStrategy = RecoveryStrategy.DIRECT

    def __post_init__(self) -> None:
        check_names(
            f"the adapter version with the number {self.number}",
            adapter=self.adapter,
            family=self.family,
            base_version=self.base_version,
            trained_on_version=self.trained_on_version,
        )

    @property
    def alias(self) -> str:
        """The alias that says: this version serves on its base."""
        return serving_alias(self.base_fingerprint_sha256)

    @property
    def is_trained(self) -> bool:
        """Whether these bytes were trained on the base they are bound to."""
        return self.base_fingerprint_sha256 == self.trained_on_fingerprint_sha256

    def __str__(self) -> str:
        return f"{self.adapter} version {self.number}"


def source_version(versions: Sequence[AdapterVersion]) -> AdapterVersion:
    """Return the version whose bytes are carried to new bases: the latest that was trained.

    Raises NotFoundError where none was (every version is a transferred or a superseded one).
    """
    trained = [v for v in versions if v.is_trained and not v.state.superseded]
    if not trained:
        raise NotFoundError(
            "the adapter has no trained version to carry over",
            expected="a version bound to the base it was trained on",
            found=", ".join(str(version) for version in versions) or "no version at all",
            do="train it, or adopt the PEFT folder it came from",
        )
    return max(trained, key=lambda version: version.number)


def version_trained_on(
    base_fingerprint_sha256: str, versions: Sequence[AdapterVersion]
) -> AdapterVersion | None:
    """Return the latest version whose bytes were trained on that base, if there is one."""
    trained = [
        version
        for version in versions
        if version.is_trained
        and not version.state.superseded
        and version.base_fingerprint_sha256 == base_fingerprint_sha256
    ]
    return max(trained, key=lambda version: version.number, default=None)
