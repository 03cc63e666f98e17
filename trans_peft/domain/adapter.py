"""Adapter versions, the aliases of an adapter, and the version that is transferred to new bases."""

from collections.abc import Sequence
from dataclasses import dataclass

from trans_peft.domain.base import BaseRef
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.leakage import SuiteLeakage
from trans_peft.domain.names import check_names
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.domain.recovery import RecoveryStrategy
from trans_peft.domain.spec import AdapterSpec
from trans_peft.errors import InvalidSpecError, NotFoundError

__all__ = [
    "AdapterSpec",
    "AdapterVersion",
    "AliasState",
    "ManualOverride",
    "VersionState",
    "source_version",
]


@dataclass(frozen=True)
class VersionState:
    """The part of a registered version that can change. Its files cannot.

    Attributes:
        verdict: Verdict of the transfer that made the version. None for a trained version.
        verdict_key: Key of that verdict.
        superseded: Whether another version with the same weights on the same base replaces it.
    """

    verdict: str | None = None
    verdict_key: str | None = None
    superseded: bool = False


@dataclass(frozen=True)
class ManualOverride:
    """An alias that a person set or removed, against the verdict.

    Attributes:
        number: The version that has the alias. None if the person removed it.
        wanted: The version that would have the alias by verdict. None for no version.
        why: The verdict, or why there is none.
        first_seen: When reconcile found the override (ISO 8601, UTC).
        by: The person. MLflow without authentication does not record it.
    """

    number: int | None
    wanted: int | None
    why: str
    first_seen: str
    by: str = "unknown"

    def __str__(self) -> str:
        found = "removed" if self.number is None else f"set on version {self.number}"
        wanted = "no version" if self.wanted is None else f"version {self.wanted}"
        return f"{found} manually (first seen {self.first_seen}); by verdict {wanted}: {self.why}"


@dataclass(frozen=True)
class AliasState:
    """The state of one alias of an adapter.

    Attributes:
        number: The version that has the alias. None for no version.
        is_manual: Whether a person set or removed the alias after reconcile last set it.
        is_unfinished: Whether a write of the alias was interrupted. Setting it again completes it.
        recorded: The manual override that the registry has recorded for the alias.
    """

    number: int | None = None
    is_manual: bool = False
    is_unfinished: bool = False
    recorded: ManualOverride | None = None


@dataclass(frozen=True)
class AdapterVersion:
    """One version of an adapter: immutable files for one base version.

    A trained version is bound to the base that it was trained on. A transferred version is bound to
    another base.

    Attributes:
        adapter: Name of the adapter.
        number: Number of the version, assigned by the registry. 1 is the oldest.
        base: The base version that the adapter version is bound to.
        trained_on: The base version of the same family that the adapter was trained on.
        weights_sha256: Hash of the adapter's weights (`models.adapter_weights_sha256`).
        method: PEFT type, such as "LORA".
        suites: Evaluation suites by which the adapter is judged.
        transferred_from: Number of the version that this one was made from. None if trained.
        recipe_sha256: Hash of the training recipe. Empty for an adopted adapter.
        run_id: MLflow run of the training.
        state: The part that can change.
        recipe: Training recipe. None for an adopted adapter.
        made_by: Recovery strategy that made the weights from those of `transferred_from`.
        leakage: Training rows that are items of a suite, for each suite. Empty for an adopted
            adapter, and for one that was trained before they were counted.

    Raises:
        InvalidSpecError: the adapter's name is invalid, or the two bases are of different families.
    """

    adapter: str
    number: int
    base: BaseRef
    trained_on: BaseRef
    weights_sha256: str
    method: str
    suites: tuple[Suite, ...]
    transferred_from: int | None = None
    recipe_sha256: str = ""
    run_id: str | None = None
    state: VersionState = VersionState()
    recipe: TrainingRecipe | None = None
    made_by: RecoveryStrategy = RecoveryStrategy.DIRECT
    leakage: tuple[SuiteLeakage, ...] = ()

    def __post_init__(self) -> None:
        check_names(f"the adapter version with the number {self.number}", adapter=self.adapter)
        if self.base.family != self.trained_on.family:
            raise InvalidSpecError(
                f"{self} is bound to a base of another family than the one it was trained on",
                expected=f"a base of the family {self.trained_on.family}",
                found=self.base,
            )

    @property
    def is_trained(self) -> bool:
        """Whether the version was trained on the base that it is bound to."""
        return self.base.fingerprint_sha256 == self.trained_on.fingerprint_sha256

    def __str__(self) -> str:
        return f"{self.adapter} version {self.number}"


def source_version(versions: Sequence[AdapterVersion]) -> AdapterVersion:
    """Return the version that is transferred to new bases: the latest trained one.

    Raises NotFoundError if all versions are transferred or superseded.
    """
    trained = [v for v in versions if v.is_trained and not v.state.superseded]
    if not trained:
        raise NotFoundError(
            "the adapter has no trained version to transfer",
            expected="a version that is bound to the base it was trained on",
            found=", ".join(str(version) for version in versions) or "no version",
            do="train the adapter, or adopt its PEFT folder",
        )
    return max(trained, key=lambda version: version.number)
