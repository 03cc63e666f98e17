"""The difference between what should be known about a fleet and what the registry says.

Desired state: every live adapter has a verdict on every ready base version that may yet serve
(`Fleet.wanted`). `observe` reads the registry, `plan` is a pure function of what was seen; what
follows from the verdicts is written by `trans_peft.lifecycle.apply_verdicts`. A hint, lost, doubled
or out of order, changes nothing here: nothing but the registry is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from trans_peft.domain.adapter import AdapterVersion, AliasState, source_version, version_trained_on
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.conventions import CHAMPION_ALIAS, SERVING_ALIAS
from trans_peft.domain.evaluation import GatePolicy, Verdict
from trans_peft.domain.outcome import Plan, Reason, TransferOutcome, TransferTask, outcome_of
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.errors import IntegrityError, StoreError, TransPeftError
from trans_peft.ports import Platform

__all__ = [
    "MAX_ATTEMPTS",
    "Adapter",
    "Fleet",
    "is_still_needed",
    "observe",
    "plan",
    "with_cost_estimates",
]

MAX_ATTEMPTS = 3
"""A key whose attempts all failed is parked for a person after so many."""


@dataclass(frozen=True)
class Adapter:
    """One live adapter as the registry shows it."""

    name: str
    versions: tuple[AdapterVersion, ...]
    outcomes: tuple[TransferOutcome, ...]
    aliases: Mapping[str, AliasState] = field(default_factory=dict)

    def alias_on(self, base: BaseVersion) -> AliasState:
        """Return where the alias that says "serves on this base" stands."""
        return self.aliases.get(base.alias, AliasState())

    def can_serve(self, base: BaseVersion, number: int | None) -> bool:
        """Whether the alias on that version means something: only bytes made for the base serve."""
        return any(
            version.number == number and version.base_fingerprint_sha256 == base.fingerprint_sha256
            for version in self.versions
        )

    def outcome_on(self, base: BaseVersion) -> TransferOutcome | None:
        """Return the newest outcome on a base for the bytes that are carried over now."""
        source = source_version(self.versions)
        return outcome_of(source.weights_sha256, base.fingerprint_sha256, self.outcomes)


@dataclass(frozen=True)
class Fleet:
    """Everything that is looked at: one family's ready bases, its aliases, its live adapters.

    `unreadable`: adapters that cannot be judged, with the reason; they stop nobody else.
    `set_aside`: what else stands in the registry and cannot be read, with the reason.
    `notes`: what stands on base versions, by number, about a promotion that did not take place.
    """

    family: str
    bases: tuple[BaseVersion, ...]
    serving: int | None
    champion: int | None
    adapters: tuple[Adapter, ...]
    unreadable: tuple[str, ...] = ()
    notes: Mapping[int, str] = field(default_factory=dict)
    set_aside: tuple[str, ...] = ()

    def base(self, number: int | None) -> BaseVersion | None:
        """Return the ready base version with that number, if there is one."""
        return next((base for base in self.bases if base.number == number), None)

    @property
    def wanted(self) -> tuple[BaseVersion, ...]:
        """The bases on which every live adapter needs a verdict, the most wanted first.

        The one that should serve and the one that does, then all that are newer, the newest first.
        Where a person wants a newer one than serves, those in between are nobody's wish any more.
        """
        named = [base for base in map(self.base, (self.champion, self.serving)) if base]
        newest_first = sorted(self.bases, key=lambda base: -base.number)
        if self.serving is None or not named:
            return tuple(dict.fromkeys([*named, *newest_first]))
        aim = named[0].number
        return tuple(dict.fromkeys([*named, *(b for b in newest_first if b.number >= aim)]))


def observe(family: str, platform: Platform, *, only: str | None = None) -> Fleet:
    """Read one family's fleet from the registry; `only`: with one of its live adapters at most."""
    adapters: list[Adapter] = []
    unreadable: list[str] = []
    for name in platform.registry.adapters(family):
        if only is not None and name != only:
            continue
        try:
            adapters.append(_adapter(name, family, platform))
        except StoreError:
            raise  # the registry does not answer: that says nothing about the adapter
        except TransPeftError as error:
            unreadable.append(f"{name}: {error}")
    return Fleet(
        family=family,
        bases=tuple(base for base in platform.catalog.versions(family) if base.ready),
        serving=platform.catalog.alias(family, SERVING_ALIAS),
        champion=platform.catalog.alias(family, CHAMPION_ALIAS),
        adapters=tuple(adapters),
        unreadable=tuple(unreadable),
        notes=platform.catalog.promotion_notes(family),
        set_aside=(*platform.catalog.set_aside(family), *platform.registry.set_aside(family)),
    )


def plan(fleet: Fleet, policy: GatePolicy) -> Plan:
    """Return the work that is missing, base by base, and what is parked for a person."""
    work: list[TransferTask] = []
    parked: list[TransferTask] = []
    trainings: list[TrainingRecipe] = []
    for base in fleet.wanted:
        for adapter in fleet.adapters:
            item = _missing(adapter, base, policy)
            if item is not None:
                (parked if item.attempt > MAX_ATTEMPTS else work).append(item)
            elif (recipe := _left_to_train(adapter, base, policy)) is not None:
                trainings.append(recipe)
    aside = (*fleet.unreadable, *fleet.set_aside)
    return Plan(fleet.family, tuple(work), tuple(parked), aside, tuple(trainings))


def is_still_needed(
    work: TransferTask, family: str, policy: GatePolicy, platform: Platform
) -> bool:
    """Whether work that was planned a while ago still is: nobody did it, nobody gave it up.

    It no longer is where another process did it or failed at it, where the adapter was retired or
    re-tuned, and where people moved on to a newer base.
    """
    now = plan(observe(family, platform, only=work.adapter), policy)
    return any(item.key == work.key for item in now.work)


def with_cost_estimates(found: Plan, fleet: Fleet, platform: Platform) -> Plan:
    """Return the plan with how long each adapter's evaluation took where it was trained.

    Apart from `observe`, because it reads whole evaluations: worth it for what is going to be done.
    """
    adapters = {adapter.name: adapter for adapter in fleet.adapters}
    seconds: dict[str, float | None] = {}
    work = []
    for item in found.work:
        if item.estimated_seconds is None:
            if item.adapter not in seconds:
                seconds[item.adapter] = _seconds(adapters[item.adapter].versions, platform)
            item = replace(item, estimated_seconds=seconds[item.adapter])
        work.append(item)
    return replace(found, work=tuple(work))


def _adapter(name: str, family: str, platform: Platform) -> Adapter:
    versions = platform.registry.versions(name)
    source_version(versions)  # without one it cannot be judged: NotFoundError
    outcomes, aliases = platform.registry.outcomes(name), platform.registry.aliases(name)
    adapter = Adapter(name, versions, outcomes, aliases)
    _check(adapter, family)
    return adapter


def _check(adapter: Adapter, family: str) -> None:
    """Raise IntegrityError where versions and outcomes contradict one another or the family."""
    problems = [
        f"version {version.number} is of the family {version.family}"
        for version in adapter.versions
        if version.family != family
    ]
    made = {version.number: version.base_fingerprint_sha256 for version in adapter.versions}
    for outcome in adapter.outcomes:
        number = outcome.new_number
        if outcome.family != family:
            problems.append(
                f"an outcome on {outcome.base_version} is of the family {outcome.family}"
            )
        elif number is not None and made.get(number) != outcome.base_fingerprint_sha256:
            problems.append(
                f"the outcome on {outcome.base_version} names version {number}, which is not made "
                "for that base"
            )
    if problems:
        raise IntegrityError(
            f"the registry's records of {adapter.name} contradict one another",
            expected=f"versions and outcomes in the family {family}",
            found="; ".join(problems),
            do="set the tags right in MLflow's page, or remove the outcome's tag: the adapter is "
            "then judged again",
        )


def _seconds(versions: tuple[AdapterVersion, ...], platform: Platform) -> float | None:
    source = source_version(versions)
    known = []
    for suite in source.suites:
        try:
            found = platform.evaluations.get(
                suite.evaluation_key(source.weights_sha256, source.base_fingerprint_sha256)
            )
        except StoreError:
            raise
        except TransPeftError:  # it cannot be read: no estimate; whoever judges says why
            continue
        known += [found.seconds] if found is not None else []
    return sum(known) if known else None


def _left_to_train(
    adapter: Adapter, base: BaseVersion, policy: GatePolicy
) -> TrainingRecipe | None:
    """Return the recipe that the outcome leaves to try. Trained by it, the outcome leaves none."""
    outcome = adapter.outcome_on(base)
    if outcome is None or outcome.policy_sha256 != policy.sha256:
        return None
    return outcome.training


def _missing(adapter: Adapter, base: BaseVersion, policy: GatePolicy) -> TransferTask | None:
    source = source_version(adapter.versions)
    if version_trained_on(base.fingerprint_sha256, adapter.versions) is not None:
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
    return TransferTask(
        adapter=adapter.name,
        source_number=source.number,
        base_version=base.version,
        reason=reason,
        attempt=attempt,
        estimated_seconds=0.0 if reason is Reason.POLICY_CHANGED else None,
    )
