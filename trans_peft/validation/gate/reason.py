"""The reason of a verdict as text, for tables, tags and reports."""

from collections.abc import Sequence

from trans_peft.domain.evaluation import (
    Comparison,
    GatePolicy,
    SliceJudgment,
    SuiteJudgment,
    Verdict,
)
from trans_peft.validation.statistics.intervals import items_to_decide, smallest_sample

__all__ = ["reason"]

_ASSUMED_ITEMS, _ASSUMED_LOSSES, _ASSUMED_GAINS = 200, 15, 15
"""Assumed results of a suite without results: 15 % discordant, as in the prior of `BettingTest`."""


def reason(
    policy: GatePolicy,
    verdict: Verdict,
    required: Sequence[SuiteJudgment],
    other: Sequence[SuiteJudgment],
) -> str:
    """Return one line that names the suites and bounds that led to the verdict.

    `required` are the required suites that were evaluated. `other` are suites that do not affect
    the verdict; they are mentioned if the adapter is inferior on them.
    """
    if verdict is Verdict.PASSED:
        parts = [_passed(policy, suite) for suite in required]
    elif verdict is Verdict.NEEDS_RETUNING:
        parts = _needs_retuning(policy, required)
    elif verdict is Verdict.RETIRE:
        parts = [_retire(policy, suite) for suite in required]
    else:
        parts = _inconclusive(policy, required)
    parts += [
        f"not required, but inferior: {_loss(policy, suite)}"
        for suite in other
        if suite.versus_old_base.inferior
    ]
    parts += [
        f"not required, but inferior: slice {part.name} of {suite.suite}, lost at least "
        f"{-part.versus_old_base.inferiority_bound:.2f} points"
        for suite in (*required, *other)
        for part in suite.slices
        if part.versus_old_base.inferior and not part.required
    ]
    test = "sequential test, " if policy.sequential else ""
    return f"{'; '.join(parts)} ({test}one-sided level {100 * policy.alpha:g} %)"


def _scores(suite: SuiteJudgment) -> str:
    items = (
        f"{suite.items} of {suite.prefix.suite_items} items"
        if suite.prefix
        else f"{suite.items} items"
    )
    if suite.clusters:
        items += f" in {suite.clusters} clusters (design effect {suite.design_effect:.1f})"
    return (
        f"{suite.suite}: score {suite.versus_old_base.reference_score:.1f} on the old base, "
        f"{suite.score:.1f} on the new base, {items}"
    )


def _passed(policy: GatePolicy, suite: SuiteJudgment) -> str:
    lower = suite.versus_old_base.lower
    change = "lost at most" if lower < 0 else "gained at least"
    parts = [_scores(suite), f"{change} {abs(lower):.2f} points, margin {policy.margin_points:g}"]
    bare, fresh = suite.versus_bare_base, suite.versus_fresh_adapter
    if policy.max_negative_flip_points is not None:
        parts.append(_flips(policy, suite))
    for part in suite.required_slices:
        lower = part.versus_old_base.lower
        change = "lost at most" if lower < 0 else "gained at least"
        parts.append(f"slice {part.name}: {change} {abs(lower):.2f} points")
    if bare is not None and bare.superior:
        parts.append(
            f"at least {bare.lower:.2f} points better than the bare new base "
            f"({bare.reference_score:.1f})"
        )
    if fresh is not None:
        parts.append(f"a freshly tuned adapter scores {fresh.reference_score:.1f}")
    return "; ".join(parts)


def _needs_retuning(policy: GatePolicy, suites: Sequence[SuiteJudgment]) -> list[str]:
    parts = [_loss(policy, suite) for suite in suites if suite.versus_old_base.inferior]
    parts += [
        f"{_scores(suite)}; slice {part.name}: lost at least "
        f"{-part.versus_old_base.inferiority_bound:.2f} points, margin {policy.margin_points:g}"
        for suite in suites
        for part in suite.required_slices
        if part.versus_old_base.inferior
    ]
    parts += [
        f"{_scores(suite)}; {_flips(policy, suite)}"
        for suite in suites
        if suite.negative_flips is not None and suite.negative_flips.above_limit
    ]
    if policy.must_match_fresh:
        parts += [
            f"{_scores(suite)}; a freshly tuned adapter scores {fresh.reference_score:.1f}, "
            f"at least {-fresh.inferiority_bound:.2f} points more, margin {policy.margin_points:g}"
            for suite in suites
            if (fresh := suite.versus_fresh_adapter) is not None and fresh.inferior
        ]
    return parts


def _loss(policy: GatePolicy, suite: SuiteJudgment) -> str:
    loss = -suite.versus_old_base.inferiority_bound
    return f"{_scores(suite)}; lost at least {loss:.2f} points, margin {policy.margin_points:g}"


def _flips(policy: GatePolicy, suite: SuiteJudgment) -> str:
    flips, limit = suite.negative_flips, policy.max_negative_flip_points
    assert flips is not None and limit is not None
    bound = f"at least {flips.lower:.2f}" if flips.above_limit else f"at most {flips.upper:.2f}"
    return (
        f"{flips.items} items are right on the old base and wrong on the new one "
        f"({flips.points:.2f} points, {bound}, limit {limit:g})"
    )


def _retire(policy: GatePolicy, suite: SuiteJudgment) -> str:
    bare = suite.versus_bare_base
    assert bare is not None  # `retire` requires this comparison
    gap = (
        f"at most {bare.upper:.2f} points worse"
        if bare.upper > 0
        else (f"at least {-bare.upper:.2f} points better")
    )
    return (
        f"{_scores(suite)}; the bare new base scores {bare.reference_score:.1f}, which is {gap} "
        f"than the adapter, margin {policy.margin_points:g}"
    )


def _inconclusive(policy: GatePolicy, suites: Sequence[SuiteJudgment]) -> list[str]:
    if not suites:
        return [_too_few_items(policy)]
    parts = [part for suite in suites if (part := _undecided(policy, suite))]
    if policy.must_match_fresh and any(suite.versus_fresh_adapter is None for suite in suites):
        parts.append(
            "the policy sets must_match_fresh, but no adapter was tuned on the new base; tune one, "
            "or use a policy without must_match_fresh"
        )
    elif not any(suite.items_needed for suite in suites):
        parts.append(
            "the adapter is better than the bare new base on some required suites, but not on all; "
            "more items will not decide this; set the serving alias manually to approve the adapter"
        )
    if any(suite.prefix and suite.items < suite.prefix.suite_items for suite in suites):
        parts.append("evaluation stopped early, because every verdict had become unlikely")
    return parts


def _too_few_items(policy: GatePolicy) -> str:
    needed = items_to_decide(
        _ASSUMED_ITEMS,
        _ASSUMED_LOSSES,
        _ASSUMED_GAINS,
        -policy.margin_points / 100,
        policy.levels(1).alpha,
    )
    discordant = (_ASSUMED_LOSSES + _ASSUMED_GAINS) / _ASSUMED_ITEMS
    return (
        "no item was evaluated, because every verdict is unlikely with so few items; about "
        f"{needed:,} would be enough if nothing was lost and {discordant:.0%} are discordant"
    )


def _undecided(policy: GatePolicy, suite: SuiteJudgment) -> str:
    """Return the undecided comparisons of a suite; an empty text if all are decided."""
    old, parts = suite.versus_old_base, []
    bare, fresh = suite.versus_bare_base, suite.versus_fresh_adapter
    if not old.non_inferior and not old.inferior:
        parts.append(
            f"the change lies between {_interval(old)} points, which does not decide whether the "
            f"loss exceeds the margin of {policy.margin_points:g} (power if nothing was lost: "
            f"{100 * suite.power:.0f} %)"
        )
    flips = suite.negative_flips
    if policy.max_negative_flip_points is not None and flips and not flips.below_limit:
        parts.append(_flips(policy, suite))
    parts += [
        _undecided_slice(policy, part)
        for part in suite.required_slices
        if not part.versus_old_base.non_inferior
    ]
    if policy.must_beat_bare and bare is not None and not bare.superior:
        parts.append(
            f"the difference from the bare new base ({bare.reference_score:.1f}) lies between "
            f"{_interval(bare)}"
        )
    if policy.must_match_fresh and fresh is not None and not fresh.non_inferior:
        parts.append(
            f"the difference from a freshly tuned adapter ({fresh.reference_score:.1f}) lies "
            f"between {_interval(fresh)}"
        )
    if suite.more_items:
        parts.append(f"about {suite.more_items:,} more items would decide")
    return f"{_scores(suite)}; {', '.join(parts)}" if parts else ""


def _undecided_slice(policy: GatePolicy, part: SliceJudgment) -> str:
    items = part.versus_old_base.items
    smallest = smallest_sample(policy.margin_points / 100, policy.alpha)
    if items < smallest:
        return (
            f"slice {part.name} has {items} items, too few for any result: a margin of "
            f"{policy.margin_points:g} points needs at least {smallest}"
        )
    needed = part.items_needed - items
    more = f" (about {needed:,} more items of it would decide)" if needed > 0 else ""
    return (
        f"the change on slice {part.name} ({items} items) lies between "
        f"{_interval(part.versus_old_base)}{more}"
    )


def _interval(comparison: Comparison) -> str:
    return f"{comparison.lower:+.2f} and {comparison.upper:+.2f}"
