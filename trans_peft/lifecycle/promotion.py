"""What a promotion policy has against a base: too few adapters would serve there, and which not."""

from trans_peft.domain.base import BaseVersion
from trans_peft.domain.fleet import Fleet, RegisteredAdapter
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.errors import NotFoundError, listed
from trans_peft.ports import Platform

__all__ = ["promotion_blockers"]


def promotion_blockers(
    fleet: Fleet, base: BaseVersion, policy: PromotionPolicy, platform: Platform
) -> str | None:
    """Return why the fleet may not move to `base` (what was expected, found, what to do), or None.

    An adapter counts where its alias on the base stands on bytes made for that base, by whoever's
    hand: a person's approval is a pass, and a person's block is none. An adapter that cannot be
    read has no verdict and blocks the move, whatever the policy's share. A required adapter of
    another family is that family's matter.
    """
    idle = [f"{a.name} ({_why_idle(a, base)})" for a in fleet.adapters if not _serves(a, base)]
    idle += fleet.unreadable
    live = len(fleet.adapters) + len(fleet.unreadable)
    problems = []
    if fleet.unreadable:
        problems.append(f"adapters that cannot be read: {listed(fleet.unreadable, 10)}")
    if live and (live - len(idle)) / live < policy.min_serving_share:
        problems.append(
            f"{live - len(idle)} of {live} live adapters serve there, not {listed(idle, 10)}"
        )
    problems += _missing(fleet, base, policy, platform)
    if not problems:
        return None
    named = (
        f", {', '.join(policy.required_adapters)} among them" if policy.required_adapters else ""
    )
    return (
        f"the fleet may not move to {base}\n"
        f"  expected: {100 * policy.min_serving_share:g} % of the live adapters on it{named}\n"
        f"  found:    {'; '.join(problems)}\n"
        f"  do:       re-tune or retire those adapters, approve one by setting its alias "
        f"{base.alias} by hand, or change the promotion policy in prefect.yaml"
    )


def _serves(adapter: RegisteredAdapter, base: BaseVersion) -> bool:
    return adapter.can_serve(base, adapter.alias_on(base).number)


def _why_idle(adapter: RegisteredAdapter, base: BaseVersion) -> str:
    state, outcome = adapter.alias_on(base), adapter.outcome_on(base)
    if state.manual:
        return "blocked by hand" if state.number is None else "set by hand on another base's bytes"
    return str(outcome.verdict) if outcome else "not judged"


def _missing(
    fleet: Fleet, base: BaseVersion, policy: PromotionPolicy, platform: Platform
) -> list[str]:
    """Return the required adapters that would not serve, each with its reason."""
    adapters = {adapter.name: adapter for adapter in fleet.adapters}
    problems = []
    for name in policy.required_adapters:
        if name in adapters:
            if not _serves(adapters[name], base):
                problems.append(f"required: {name} ({_why_idle(adapters[name], base)})")
            continue
        try:
            family = platform.registry.family(name)
        except NotFoundError:
            problems.append(f"required: {name} (there is no such adapter)")
        else:
            if family == fleet.family:
                problems.append(f"required: {name} (retired, or it cannot be read)")
    return problems
