"""Compare the desired state of a fleet with the registry, and plan the missing transfers.

Desired state: every live adapter has a verdict on every ready base version that may still serve
(`Fleet.desired_bases`). `observe` reads the registry, and `plan` is a pure function of the result.
`trans_peft.lifecycle.apply_verdicts` writes what follows from the verdicts. Notifications are not
read here, so lost, doubled or reordered ones have no effect on the plan.
"""

from collections.abc import Collection
from dataclasses import replace
from importlib.metadata import version
from statistics import median

from trans_peft.domain.adapter import AdapterVersion, source_version
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.conventions import CHAMPION_ALIAS, SERVING_ALIAS
from trans_peft.domain.evaluation import GatePolicy, Verdict, suites_sha256
from trans_peft.domain.fleet import Fleet, RegisteredAdapter
from trans_peft.domain.identity import content_sha256
from trans_peft.domain.outcome import Plan, Reason, TransferTask
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.domain.recovery import RecoveryStrategy
from trans_peft.errors import IntegrityError, StoreError, TransPeftError
from trans_peft.ports import Platform

__all__ = [
    "MAX_ATTEMPTS",
    "MAX_ESTIMATES",
    "is_still_needed",
    "observe",
    "observe_adapter",
    "plan",
    "revision",
    "with_cost_estimates",
]

MAX_ATTEMPTS = 3
"""After this many failed attempts under one policy, a task is parked until a person acts."""

MAX_ESTIMATES = 20
"""The number of adapters whose evaluations are read to estimate the duration of their tasks."""


def observe(family: str, platform: Platform) -> Fleet:
    """Read the whole fleet of one family from the registry, in a few searches.

    An adapter that cannot be read is listed in `unreadable` and does not affect the others. Raises
    StoreError if the registry does not respond.
    """
    found = platform.registry.fleet(family)
    unreadable = [*found.unreadable]
    adapters = [one for one in found.live if _is_usable(one, family, unreadable)]
    return replace(
        _observe_bases(family, platform),
        adapters=tuple(adapters),
        unreadable=tuple(unreadable),
        notes=platform.catalog.promotion_notes(family),
        set_aside=platform.catalog.set_aside(family),
    )


def observe_adapter(adapter: str, family: str, platform: Platform) -> Fleet:
    """Read one adapter and the base versions of its family: all that one transfer needs.

    Returns a fleet with this adapter alone, without `notes` and `set_aside`. It has no adapter if
    this one is retired or unknown, belongs to another family, or cannot be read.
    """
    unreadable: list[str] = []
    adapters: tuple[RegisteredAdapter, ...] = ()
    try:
        found = platform.registry.adapter(adapter)
    except StoreError:
        raise  # the registry did not respond, so the adapter did not fail
    except TransPeftError as error:
        unreadable.append(f"{adapter}: {error}")
    else:
        if _is_usable(found, family, unreadable) and found.is_live:
            adapters = (found,)
    return replace(
        _observe_bases(family, platform), adapters=adapters, unreadable=tuple(unreadable)
    )


def revision(
    family: str, policy: GatePolicy, promotion: PromotionPolicy, platform: Platform
) -> str:
    """Return a hash that changes with what the next look at a family would find, in five requests.

    It covers the ready base versions and their aliases, both policies, this package's version, and
    whether a version of an adapter was registered. It does not cover tags and aliases of adapters,
    which a person may change: MLflow offers no search for what changed in them.
    """
    bases = _observe_bases(family, platform)
    newest = platform.registry.newest(family)
    return content_sha256([version("trans-peft"), bases, newest, policy, promotion])


def plan(fleet: Fleet, policy: GatePolicy) -> Plan:
    """Return the missing transfers, by base version, and the parked ones."""
    tasks: list[TransferTask] = []
    parked: list[TransferTask] = []
    trainings: list[TrainingRecipe] = []
    for base in fleet.desired_bases:
        for adapter in fleet.adapters:
            item = _missing(adapter, base, policy)
            if item is not None:
                (parked if item.attempt > MAX_ATTEMPTS else tasks).append(item)
            elif (recipe := _pending_retraining(adapter, base, policy)) is not None:
                trainings.append(recipe)
    aside = (*fleet.unreadable, *fleet.set_aside)
    return Plan(
        fleet.family,
        tuple(tasks),
        tuple(parked),
        aside,
        tuple(trainings),
        None if fleet.awaited_base is None else fleet.awaited_base.ref,
        recoveries=policy.recovery.strategies[1:],
    )


def is_still_needed(task: TransferTask, fleet: Fleet, policy: GatePolicy) -> bool:
    """Return whether a planned task is still part of the plan for a fleet that was just read.

    It is not if another process completed or failed the task, if the adapter was retired or
    re-tuned, or if `champion` moved to a newer base version.
    """
    return any(item.key == task.key for item in plan(fleet, policy).tasks)


def with_cost_estimates(found: Plan, fleet: Fleet, platform: Platform) -> Plan:
    """Return the plan with an estimated duration for each task, where one is known.

    The estimate is the duration of the adapter's longest transfer so far. Without one, it is the
    duration of its evaluation on the base that it was trained on, which includes no recovery.
    `plan` does not estimate, because this function reads from the evaluation store, for the first
    `MAX_ESTIMATES` adapters.
    """
    adapters = {adapter.name: adapter for adapter in fleet.adapters}
    seconds: dict[str, float | None] = {}
    reads = 0
    tasks = []
    for item in found.tasks:
        if item.estimated_seconds is None:
            adapter = adapters[item.adapter]
            if item.adapter not in seconds:
                known = max((outcome.seconds for outcome in adapter.outcomes), default=0.0)
                seconds[item.adapter] = known or None
                if not known and reads < MAX_ESTIMATES:
                    reads += 1
                    try:
                        seconds[item.adapter] = _seconds(adapter.versions, platform)
                    except StoreError:  # a plan without estimates is better than no plan
                        return found
            item = replace(item, estimated_seconds=seconds[item.adapter])
        tasks.append(item)
    return replace(
        found, tasks=tuple(tasks), recovery_seconds=_recovery_seconds(fleet, found.recoveries)
    )


def _recovery_seconds(fleet: Fleet, strategies: Collection[RecoveryStrategy]) -> float | None:
    """Return the median duration of the recoveries of a fleet by these strategies, or None."""
    durations = []
    for adapter in fleet.adapters:
        for outcome in adapter.outcomes:
            attempts = [
                attempt.seconds
                for attempt in outcome.tried
                if attempt.verdict and attempt.strategy in strategies
            ]
            durations += [sum(attempts)] if attempts else []
    return median(durations) if durations else None


def _observe_bases(family: str, platform: Platform) -> Fleet:
    return Fleet(
        family=family,
        bases=tuple(base for base in platform.catalog.versions(family) if base.ready),
        serving=platform.catalog.alias(family, SERVING_ALIAS),
        champion=platform.catalog.alias(family, CHAMPION_ALIAS),
        adapters=(),
    )


def _is_usable(adapter: RegisteredAdapter, family: str, unreadable: list[str]) -> bool:
    """Return whether all values of an adapter are valid; if not, add the reason to `unreadable`."""
    try:
        source = adapter.source  # raises NotFoundError if no version was trained
        for suite in source.suites:
            _ = suite.suite_sha256  # raises InvalidSpecError if its evaluations have no key
        for recipe in (
            *(version.recipe for version in adapter.versions),
            *(outcome.training for outcome in adapter.outcomes),
        ):
            _ = recipe and recipe.sha256  # raises InvalidSpecError if it cannot be trained
        _check(adapter, family)
    except TransPeftError as error:
        unreadable.append(f"{adapter.name}: {error}")
        return False
    return True


def _check(adapter: RegisteredAdapter, family: str) -> None:
    """Raise IntegrityError if versions, outcomes and family of an adapter contradict each other."""
    problems = [
        f"version {version.number} is of the family {version.base.family}"
        for version in adapter.versions
        if version.base.family != family
    ]
    bases = {version.number: version.base.fingerprint_sha256 for version in adapter.versions}
    for outcome in adapter.outcomes:
        number = outcome.new_number
        if outcome.base.family != family:
            problems.append(f"an outcome is of the base {outcome.base}")
        elif number is not None and bases.get(number) != outcome.base.fingerprint_sha256:
            problems.append(
                f"the outcome on {outcome.base} names version {number}, which is not "
                "registered for that base"
            )
    if problems:
        raise IntegrityError(
            f"the records of {adapter.name} in the registry contradict each other",
            expected=f"versions and outcomes in the family {family}",
            found="; ".join(problems),
            do="correct the tags in MLflow, or remove the tag of the outcome: the adapter is then "
            "evaluated again",
        )


def _seconds(versions: tuple[AdapterVersion, ...], platform: Platform) -> float | None:
    source = source_version(versions)
    known = []
    for suite in source.suites:
        try:
            found = platform.evaluations.summary(
                suite.evaluation_key(source.weights_sha256, source.base.fingerprint_sha256)
            )
        except StoreError:
            raise
        except TransPeftError:  # unreadable: the transfer itself reports the reason
            continue
        known += [found.seconds] if found is not None else []
    return sum(known) if known else None


def _pending_retraining(
    adapter: RegisteredAdapter, base: BaseVersion, policy: GatePolicy
) -> TrainingRecipe | None:
    """Return the recipe that retraining still has to try on a base, or None."""
    outcome = adapter.outcome_on(base)
    if outcome is None or outcome.policy_sha256 != policy.sha256:
        return None
    return outcome.training


def _missing(
    adapter: RegisteredAdapter, base: BaseVersion, policy: GatePolicy
) -> TransferTask | None:
    source = adapter.source
    if adapter.trained_on(base) is not None:
        return None
    outcome, seconds = adapter.outcome_on(base), None
    if outcome is None:
        reason, attempt = Reason.NO_VERDICT, 1
    elif outcome.verdict is Verdict.FAILED:
        # As `TransferOutcome.counted_after` counts: a new policy starts at the first attempt.
        same_policy = outcome.policy_sha256 == policy.sha256
        reason, attempt = Reason.RETRY, outcome.attempts + 1 if same_policy else 1
    elif outcome.verdict is not Verdict.INCOMPATIBLE and outcome.policy_sha256 != policy.sha256:
        reason, attempt = Reason.POLICY_CHANGED, 1
        # A recovery is computed again, because its weights may depend on the policy.
        if outcome.verdict is Verdict.PASSED or policy.recovery.strategies[1:] == ():
            seconds = 0.0
    else:
        return None
    return TransferTask(
        adapter=adapter.name,
        source_number=source.number,
        base=base.ref,
        reason=reason,
        attempt=attempt,
        estimated_seconds=seconds,
        suites_sha256=suites_sha256(source.suites),
    )
