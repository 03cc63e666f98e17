"""Decide whether a fleet may move to a base version, and describe what prevents it."""

from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import Verdict
from trans_peft.domain.fleet import (
    ChampionNotReady,
    Fleet,
    IdleAdapter,
    IdleReason,
    PolicyNotMet,
    PromotionObstacle,
    RegisteredAdapter,
    VerdictsMissing,
)
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.errors import NotFoundError, listed
from trans_peft.ports import Platform

__all__ = ["check_policy", "describe_obstacle", "idle_adapter"]

_MAX_NAMES = 10


def check_policy(
    fleet: Fleet, base: BaseVersion, policy: PromotionPolicy, platform: Platform
) -> PolicyNotMet | None:
    """Return how the fleet fails the promotion policy on `base`, or None if it meets the policy.

    An adapter serves on `base` if its alias there is set on a version for that base, by verdict or
    manually. An adapter that cannot be read has no verdict and prevents the promotion, whatever the
    policy's share. A required adapter of another family is ignored.
    """
    found = PolicyNotMet(
        base=base,
        policy=policy,
        live=len(fleet.adapters) + len(fleet.unreadable),
        idle=tuple(filter(None, (idle_adapter(adapter, base) for adapter in fleet.adapters))),
        unreadable=fleet.unreadable,
        required=_idle_required(fleet, base, policy, platform),
    )
    return found if found.share_is_too_small or found.unreadable or found.required else None


def describe_obstacle(obstacle: PromotionObstacle) -> str:
    """Return why `serving` does not move, as text for a person: the problem and what to do."""
    match obstacle:
        case VerdictsMissing(base, adapters):
            return f"{base} waits for {len(adapters)} verdicts: {listed(adapters, _MAX_NAMES)}"
        case ChampionNotReady(family, number):
            return (
                f"champion is set on version {number} of {family}, which cannot serve\n"
                "  expected: a version that ingestion made ready\n"
                "  found:    a version that is not ingested, that ingestion refused, or that is a "
                "copy\n"
                "  do:       read the log of the last ingest run; for a copy, set champion on the "
                "original version"
            )
        case PolicyNotMet():
            return _describe_policy(obstacle)


def _describe_policy(found: PolicyNotMet) -> str:
    problems = []
    if found.unreadable:
        problems.append(f"adapters that cannot be read: {listed(found.unreadable, _MAX_NAMES)}")
    if found.share_is_too_small:
        idle = [*map(_named, found.idle), *found.unreadable]
        problems.append(
            f"{found.serving} of {found.live} live adapters serve there, "
            f"not {listed(idle, _MAX_NAMES)}"
        )
    problems += [f"required: {_named(adapter)}" for adapter in found.required]
    policy = found.policy
    outside = sum(adapter.reason is Verdict.PASSED for adapter in found.idle)
    if policy.fdr is not None and outside:
        problems.append(f"{outside} adapters passed, but not within the FDR target {policy.fdr:g}")
    required = (
        f", including {', '.join(policy.required_adapters)}" if policy.required_adapters else ""
    )
    return (
        f"the fleet may not move to {found.base}\n"
        f"  expected: {100 * policy.min_serving_share:g} % of the live adapters on it{required}\n"
        f"  found:    {'; '.join(problems)}\n"
        f"  do:       retrain or retire those adapters, approve one by setting its alias "
        f"{found.base.alias} in MLflow, or change the promotion policy in prefect.yaml"
    )


def _named(adapter: IdleAdapter) -> str:
    return f"{adapter.name} ({adapter.reason})"


def idle_adapter(adapter: RegisteredAdapter, base: BaseVersion) -> IdleAdapter | None:
    """Return why an adapter does not serve on a base, or None if it serves."""
    state, outcome = adapter.alias_on(base), adapter.deciding_outcome_on(base)
    if adapter.serving_on(base) is not None:
        return None
    if state.is_manual:
        blocked = state.number is None
        return IdleAdapter(adapter.name, IdleReason.BLOCKED if blocked else IdleReason.OTHER_BASE)
    return IdleAdapter(adapter.name, outcome.verdict if outcome else IdleReason.NO_VERDICT)


def _idle_required(
    fleet: Fleet, base: BaseVersion, policy: PromotionPolicy, platform: Platform
) -> tuple[IdleAdapter, ...]:
    adapters = {adapter.name: adapter for adapter in fleet.adapters}
    idle: list[IdleAdapter | None] = []
    for name in policy.required_adapters:
        if name in adapters:
            idle.append(idle_adapter(adapters[name], base))
            continue
        try:
            family = platform.registry.family(name)
        except NotFoundError:
            idle.append(IdleAdapter(name, IdleReason.UNKNOWN))
        else:
            if family == fleet.family:
                idle.append(IdleAdapter(name, IdleReason.NOT_LIVE))
    return tuple(filter(None, idle))
