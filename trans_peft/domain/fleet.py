"""One family as it was read from the registry, and the changes that reconcile makes to it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from trans_peft.domain.adapter import AdapterVersion, AliasState, ManualOverride, source_version
from trans_peft.domain.base import BaseRef, BaseVersion
from trans_peft.domain.evaluation import Verdict
from trans_peft.domain.outcome import TransferOutcome, outcome_of
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.domain.recovery import RecoveryStrategy
from trans_peft.errors import NotFoundError

__all__ = [
    "AliasChange",
    "ChampionNotReady",
    "FamilyAdapters",
    "Fleet",
    "FleetChanges",
    "IdleAdapter",
    "IdleReason",
    "ObservedOverride",
    "PolicyNotMet",
    "PromotionObstacle",
    "RegisteredAdapter",
    "VerdictsMissing",
]


@dataclass(frozen=True)
class RegisteredAdapter:
    """One adapter with everything that the registry holds about it.

    Attributes:
        name: The adapter's name.
        family: The base family that it belongs to.
        is_live: False for an adapter that is tagged as retired.
        versions: All versions, oldest first.
        outcomes: The newest outcome per base, without evaluations.
        aliases: The state of each alias that is set, was set by reconcile, or has a record.
        owner: The tag `owner` of the registered model; empty without it.
    """

    name: str
    family: str
    versions: tuple[AdapterVersion, ...]
    outcomes: tuple[TransferOutcome, ...] = ()
    aliases: Mapping[str, AliasState] = field(default_factory=dict)
    is_live: bool = True
    owner: str = ""

    @property
    def source(self) -> AdapterVersion:
        """The version whose weights are transferred to new bases.

        Raises NotFoundError if no version was trained.
        """
        return source_version(self.versions)

    def alias_on(self, base: BaseVersion) -> AliasState:
        """Return the state of the alias that marks the version which serves on a base."""
        return self.aliases.get(base.alias, AliasState())

    def serving_on(self, base: BaseVersion) -> AdapterVersion | None:
        """Return the version that serves on a base: the one with its alias that was made for it.

        None if there is none, and for an adapter that is not live.
        """
        if not self.is_live:
            return None
        number, fingerprint_sha256 = self.alias_on(base).number, base.fingerprint_sha256
        for version in self.versions:
            if version.number == number and version.base.fingerprint_sha256 == fingerprint_sha256:
                return version
        return None

    def trained_on(self, base: BaseVersion) -> AdapterVersion | None:
        """Return the latest version that was trained on a base, or None."""
        trained = [
            version
            for version in self.versions
            if version.is_trained
            and not version.state.superseded
            and version.base.fingerprint_sha256 == base.fingerprint_sha256
        ]
        return max(trained, key=lambda version: version.number, default=None)

    def outcome_on(self, base: BaseVersion) -> TransferOutcome | None:
        """Return the newest outcome of the source version's weights on a base."""
        return outcome_of(self.source.weights_sha256, base.fingerprint_sha256, self.outcomes)

    def retrained_on(self, base: BaseVersion) -> AdapterVersion | None:
        """Return `trained_on(base)` if the recovery strategy `retrained` made it, else None.

        Such a version serves by the verdict of that strategy, not because it was trained there.
        """
        trained = self.trained_on(base)
        is_retrained = trained is not None and trained.made_by is RecoveryStrategy.RETRAINED
        return trained if is_retrained else None

    def deciding_outcome_on(self, base: BaseVersion) -> TransferOutcome | None:
        """Return the outcome that registered `retrained_on(base)`, or else `outcome_on(base)`."""
        retrained = self.retrained_on(base)
        if retrained is None:
            return self.outcome_on(base)
        found = (one for one in self.outcomes if one.new_number == retrained.number)
        return next(found, None)

    def was_judged_on(self, base: BaseVersion) -> bool:
        """Return whether any version's weights have an outcome on a base.

        It stays true if the adapter is trained on the base afterwards.
        """
        return any(
            outcome.base.fingerprint_sha256 == base.fingerprint_sha256 for outcome in self.outcomes
        )


@dataclass(frozen=True)
class FamilyAdapters:
    """The adapters of one family, as one read of the registry found them.

    Attributes:
        live: The live adapters that can be read, by name.
        unreadable: The live adapters that cannot be read, each with the reason.
    """

    live: tuple[RegisteredAdapter, ...]
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fleet:
    """One family's ready base versions, its aliases and its live adapters, as they were read.

    Attributes:
        family: The name of the base family.
        bases: The ready base versions, oldest first.
        serving: The number of the base version with the alias `serving`.
        champion: The number of the base version with the alias `champion`, ready or not.
        adapters: The live adapters.
        unreadable: Adapters that cannot be read, each with the reason. They block a promotion.
        notes: Stored notes about refused promotions, by number of the base version.
        set_aside: Base versions that cannot be read, each with the reason.
    """

    family: str
    bases: tuple[BaseVersion, ...]
    serving: int | None
    champion: int | None
    adapters: tuple[RegisteredAdapter, ...]
    unreadable: tuple[str, ...] = ()
    notes: Mapping[int, str] = field(default_factory=dict)
    set_aside: tuple[str, ...] = ()

    def base(self, number: int | None) -> BaseVersion | None:
        """Return the ready base version with that number, or None."""
        return next((base for base in self.bases if base.number == number), None)

    def referred_base(self, ref: BaseRef) -> BaseVersion:
        """Return the ready base version with that fingerprint. Raises NotFoundError."""
        for base in self.bases:
            if base.fingerprint_sha256 == ref.fingerprint_sha256:
                return base
        raise NotFoundError(
            f"family {self.family!r} has no ready base version {ref.version!r} with the "
            f"fingerprint {ref.fingerprint_sha256[:12]}",
            expected=", ".join(
                f"{base.version} ({base.fingerprint_sha256[:12]})" for base in self.bases
            )
            or "none is ready yet",
            do="ingest the base first",
        )

    def adapter(self, name: str) -> RegisteredAdapter:
        """Return the live adapter with that name. Raises NotFoundError."""
        for adapter in self.adapters:
            if adapter.name == name:
                return adapter
        raise NotFoundError(
            f"family {self.family!r} has no live adapter {name!r}",
            expected=", ".join(adapter.name for adapter in self.adapters) or "no live adapter",
            found="; ".join(self.unreadable) or repr(name),
            do="train or adopt the adapter, or remove its tag `retired`",
        )

    @property
    def awaited_base(self) -> BaseVersion | None:
        """The base version to which a person wants the fleet to move: `champion`, not `serving`."""
        return None if self.champion == self.serving else self.base(self.champion)

    @property
    def desired_bases(self) -> tuple[BaseVersion, ...]:
        """The base versions on which every live adapter needs a verdict, most important first.

        `champion` and `serving` come first, then every version that is newer than `champion` (or
        than `serving` without a champion), the newest first. Older versions are left out. If
        nothing serves yet, every version is included.
        """
        named = [base for base in map(self.base, (self.champion, self.serving)) if base]
        newest_first = sorted(self.bases, key=lambda base: -base.number)
        if self.serving is None or not named:
            return tuple(dict.fromkeys([*named, *newest_first]))
        lowest = named[0].number
        return tuple(dict.fromkeys([*named, *(b for b in newest_first if b.number >= lowest)]))


@dataclass(frozen=True)
class AliasChange:
    """An adapter's alias that reconcile set on a version, or removed (`number` is None)."""

    adapter: str
    alias: str
    number: int | None


@dataclass(frozen=True)
class ObservedOverride:
    """A manual override of an adapter's alias on one base version. Reconcile keeps it."""

    adapter: str
    base: BaseRef
    override: ManualOverride


class IdleReason(StrEnum):
    """Why an adapter does not serve on a base version, if the verdict is not the reason."""

    NO_VERDICT = "no verdict"
    BLOCKED = "blocked manually"
    OTHER_BASE = "manually set on a version for another base"
    UNKNOWN = "no such adapter"
    NOT_LIVE = "retired or unreadable"


@dataclass(frozen=True)
class IdleAdapter:
    """An adapter that does not serve on a base version, with the reason."""

    name: str
    reason: Verdict | IdleReason


@dataclass(frozen=True)
class VerdictsMissing:
    """`serving` waits: live adapters have no verdict on the base version with `champion` yet."""

    base: BaseVersion
    adapters: tuple[str, ...]


@dataclass(frozen=True)
class ChampionNotReady:
    """`champion` is set on a version number that ingestion has not made ready, or on a copy."""

    family: str
    number: int


@dataclass(frozen=True)
class PolicyNotMet:
    """The promotion policy does not allow the fleet to move to `base`.

    Attributes:
        base: The base version with the alias `champion`.
        policy: The promotion policy.
        live: The number of live adapters, readable or not.
        idle: The live adapters that do not serve on `base`.
        unreadable: The live adapters that cannot be read, each with the reason.
        required: The required adapters that do not serve on `base`.
    """

    base: BaseVersion
    policy: PromotionPolicy
    live: int
    idle: tuple[IdleAdapter, ...]
    unreadable: tuple[str, ...]
    required: tuple[IdleAdapter, ...]

    @property
    def serving(self) -> int:
        """The number of live adapters that serve on `base`."""
        return self.live - len(self.idle) - len(self.unreadable)

    @property
    def share_is_too_small(self) -> bool:
        """Whether the share of serving adapters is below `min_serving_share`."""
        return self.live > 0 and self.serving / self.live < self.policy.min_serving_share


PromotionObstacle = VerdictsMissing | ChampionNotReady | PolicyNotMet
"""Why `serving` does not move to `champion`. All but `VerdictsMissing` refuse the promotion."""


@dataclass(frozen=True)
class FleetChanges:
    """What one run of apply-verdicts changed, and why it changed nothing else.

    Attributes:
        aliases: The aliases of adapters that it set or removed.
        manual_overrides: The aliases that a person set or removed. They are kept.
        promoted: The base version to which `serving` moved.
        obstacle: Why `serving` did not move to `champion`.
        already_reported: Whether the obstacle was noted in the registry before.
        is_outdated: Whether `champion` or `serving` was moved by another process or person in the
            meantime, so that the verdicts must be applied again.
        unreadable: Registry entries that cannot be read, each with the reason.
    """

    aliases: tuple[AliasChange, ...] = ()
    manual_overrides: tuple[ObservedOverride, ...] = ()
    promoted: BaseVersion | None = None
    obstacle: PromotionObstacle | None = None
    already_reported: bool = False
    is_outdated: bool = False
    unreadable: tuple[str, ...] = ()

    @property
    def is_refused(self) -> bool:
        """Whether the promotion is refused until a person acts."""
        return self.obstacle is not None and not isinstance(self.obstacle, VerdictsMissing)
