"""The difference between what should be known about a fleet and what the registry says.

Desired state: every live adapter has a verdict on every ready base version that is not older than
the serving one (nor than the one a person wants to serve). `observe` reads the registry, `plan` is
a pure function of what was seen, `settle` writes what follows: aliases by verdict, then `serving`.
A hint, lost, doubled or out of order, changes nothing here: nothing but the registry is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from trans_peft.domain.adapter import AdapterVersion, source_version
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import GatePolicy, Verdict
from trans_peft.domain.outcome import FleetChanges, Plan, Reason, TransferOutcome, Work
from trans_peft.errors import StoreError, TransPeftError
from trans_peft.ports import Platform

__all__ = ["MAX_ATTEMPTS", "Adapter", "Fleet", "observe", "plan", "settle"]

MAX_ATTEMPTS = 3
"""A key whose attempts all failed is parked for a person after so many."""


@dataclass(frozen=True)
class Adapter:
    """One live adapter as the registry shows it. `reference_seconds`: what evaluating it took."""

    name: str
    versions: tuple[AdapterVersion, ...]
    outcomes: tuple[TransferOutcome, ...]
    reference_seconds: float | None = None

    def outcome_on(self, base: BaseVersion) -> TransferOutcome | None:
        """Return the newest outcome on a base for the bytes that are carried over now."""
        source = source_version(self.versions)
        return next(
            (
                outcome
                for outcome in self.outcomes
                if outcome.base_fingerprint_sha256 == base.fingerprint_sha256
                and outcome.weights_sha256 == source.weights_sha256
            ),
            None,
        )


@dataclass(frozen=True)
class Fleet:
    """Everything that `plan` looks at: one family's ready bases, its aliases, its live adapters.

    `unreadable`: adapters that cannot be judged, with the reason; they stop nobody else.
    """

    family: str
    bases: tuple[BaseVersion, ...]
    serving: int | None
    champion: int | None
    adapters: tuple[Adapter, ...]
    unreadable: tuple[str, ...] = ()

    def base(self, number: int | None) -> BaseVersion | None:
        """Return the ready base version with that number, if there is one."""
        return next((base for base in self.bases if base.number == number), None)

    @property
    def wanted(self) -> tuple[BaseVersion, ...]:
        """The bases on which every live adapter needs a verdict, oldest first."""
        named = [base for base in map(self.base, (self.serving, self.champion)) if base]
        if self.serving is None or not named:
            return self.bases
        oldest = min(base.number for base in named)
        return tuple(base for base in self.bases if base.number >= oldest)


def observe(family: str, platform: Platform) -> Fleet:
    """Read one family's fleet from the registry."""
    adapters: list[Adapter] = []
    unreadable: list[str] = []
    for name in platform.registry.adapters(family):
        try:
            adapters.append(_adapter(name, platform))
        except StoreError:
            raise  # the registry does not answer: that says nothing about the adapter
        except TransPeftError as error:
            unreadable.append(f"{name}: {error}")
    return Fleet(
        family=family,
        bases=tuple(base for base in platform.catalog.versions(family) if base.ready),
        serving=platform.catalog.alias(family, "serving"),
        champion=platform.catalog.alias(family, "champion"),
        adapters=tuple(adapters),
        unreadable=tuple(unreadable),
    )


def plan(fleet: Fleet, policy: GatePolicy) -> Plan:
    """Return the work that is missing, base by base, and what is parked for a person."""
    work: list[Work] = []
    parked: list[Work] = []
    for base in fleet.wanted:
        for adapter in fleet.adapters:
            item = _missing(adapter, base, policy)
            if item is None:
                continue
            (parked if item.attempt > MAX_ATTEMPTS else work).append(item)
    return Plan(fleet.family, tuple(work), tuple(parked), fleet.unreadable)


def settle(fleet: Fleet, policy: GatePolicy, platform: Platform) -> FleetChanges:
    """Write what the verdicts say: each adapter's alias on each base, then `serving`.

    An alias that a person set or took away stays as it is. `serving` moves to `champion` only when
    no verdict is missing on it; otherwise the reason is returned in `waiting`.
    """
    aliases, overruled = [], []
    for adapter in fleet.adapters:
        for alias, number in _wanted_aliases(adapter, fleet).items():
            current = platform.registry.alias(adapter.name, alias)
            if current == number:
                continue
            if not platform.registry.owns_alias(adapter.name, alias):
                overruled.append(f"{adapter.name}: {alias} is a person's ({_named(current)})")
                continue
            platform.registry.set_alias(adapter.name, alias, number)
            aliases.append(f"{adapter.name}: {alias} -> {_named(number)}")
    promoted, waiting = _promote(fleet, policy, platform)
    return FleetChanges(
        aliases=tuple(aliases), overruled=tuple(overruled), promoted=promoted, waiting=waiting
    )


def _adapter(name: str, platform: Platform) -> Adapter:
    versions = platform.registry.versions(name)
    return Adapter(name, versions, platform.registry.outcomes(name), _seconds(versions, platform))


def _seconds(versions: tuple[AdapterVersion, ...], platform: Platform) -> float | None:
    source = source_version(versions)
    found = [
        platform.evaluations.get(
            suite.evaluation_key(source.weights_sha256, source.base_fingerprint_sha256)
        )
        for suite in source.suites
    ]
    known = [evaluation.seconds for evaluation in found if evaluation is not None]
    return sum(known) if known else None


def _missing(adapter: Adapter, base: BaseVersion, policy: GatePolicy) -> Work | None:
    source = source_version(adapter.versions)
    if source.base_fingerprint_sha256 == base.fingerprint_sha256:
        return None
    outcome = adapter.outcome_on(base)
    if outcome is None:
        reason, attempt = Reason.NEVER_JUDGED, 1
    elif outcome.verdict is Verdict.FAILED:
        reason, attempt = Reason.RETRY, outcome.attempts + 1
    elif outcome.verdict is not Verdict.INCOMPATIBLE and outcome.policy_sha256 != policy.sha256:
        reason, attempt = Reason.POLICY_CHANGED, 1
    else:
        return None
    return Work(
        adapter=adapter.name,
        source_number=source.number,
        base_version=base.version,
        reason=reason,
        attempt=attempt,
        estimated_seconds=0.0 if reason is Reason.POLICY_CHANGED else adapter.reference_seconds,
    )


def _wanted_aliases(adapter: Adapter, fleet: Fleet) -> Mapping[str, int | None]:
    source = source_version(adapter.versions)
    wanted: dict[str, int | None] = {}
    for base in fleet.bases:
        if base.fingerprint_sha256 == source.base_fingerprint_sha256:
            wanted[base.alias] = source.number
            continue
        outcome = adapter.outcome_on(base)
        if outcome is not None and outcome.verdict is not Verdict.FAILED:  # errors decide nothing
            passed = outcome.verdict is Verdict.PASSED
            wanted[base.alias] = outcome.new_number if passed else None
    return wanted


def _promote(fleet: Fleet, policy: GatePolicy, platform: Platform) -> tuple[str | None, str | None]:
    champion = fleet.base(fleet.champion)
    if fleet.champion is None or fleet.champion == fleet.serving:
        return None, None
    if champion is None:
        return None, f"champion is version {fleet.champion}, which is not ready"
    missing = [
        item.adapter for item in plan(fleet, policy).work if item.base_version == champion.version
    ]
    if missing:
        return None, f"{champion} waits for {len(missing)} verdicts: {', '.join(missing[:10])}"
    platform.catalog.set_serving(champion)
    return str(champion), None


def _named(number: int | None) -> str:
    return "none" if number is None else f"version {number}"
