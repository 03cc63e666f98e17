"""Compare the adapter on a new base with its references, on one suite.

`judge_suite` uses Tango's score bounds on all items (`trans_peft.validation.statistics.clusters`).
`judge_sequential_suite` uses betting tests on the items evaluated so far
(`trans_peft.validation.statistics.betting`).
"""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import Any, NamedTuple

from trans_peft.domain.evaluation import (
    Comparison,
    Evaluation,
    GatePolicy,
    Levels,
    NegativeFlips,
    Prefix,
    SliceJudgment,
    SuiteJudgment,
)
from trans_peft.validation.statistics.betting import power_of_betting_test
from trans_peft.validation.statistics.clusters import ClusterCounts
from trans_peft.validation.statistics.degrees import DegreeChanges
from trans_peft.validation.statistics.order import SuiteClusters
from trans_peft.validation.statistics.pairing import count_flips, count_pairs
from trans_peft.validation.statistics.sequential import (
    EvaluatedModel,
    SequentialSuiteTest,
)

__all__ = ["judge_sequential_suite", "judge_suite"]


class _Compared(NamedTuple):
    counts: ClusterCounts | DegreeChanges
    comparison: Comparison


def judge_suite(
    policy: GatePolicy,
    required_count: int,
    reference: Evaluation,
    candidate: Evaluation,
    bare: Evaluation | None,
    fresh: Evaluation | None = None,
) -> SuiteJudgment:
    """Return the figures of a suite of which every item was evaluated.

    `required_count` is the number of required suites, which share the level of the inferiority
    tests. The evaluations are those of `trans_peft.validation.gate.judge`.
    """
    has_fresh_test = policy.must_match_fresh and fresh is not None
    levels = policy.levels(required_count, has_fresh_test=has_fresh_test)

    def compared_with(other: Evaluation) -> _Compared:
        counts = count_pairs(other, candidate, policy.margin_points / 100)
        return _Compared(counts, _score_comparison(policy, levels, counts, other.score))

    versus_old = compared_with(reference)
    versus_bare = compared_with(bare) if bare is not None else None
    versus_fresh = compared_with(fresh) if fresh is not None else None
    margin = policy.margin_points / 100
    slices = _slices(policy, levels, reference, candidate)
    flips = count_flips(reference, candidate)
    items_needed = _items_needed(policy, levels, versus_old, versus_bare, versus_fresh, flips)
    return SuiteJudgment(
        suite=reference.suite,
        score=candidate.score,
        versus_old_base=versus_old.comparison,
        power=versus_old.counts.power_of_non_inferiority(margin, levels.alpha),
        versus_bare_base=versus_bare and versus_bare.comparison,
        versus_fresh_adapter=versus_fresh and versus_fresh.comparison,
        items_needed=max([items_needed, *(_suite_items(part, versus_old) for part in slices)]),
        negative_flips=_negative_flips(policy, levels, flips),
        slices=slices,
        **_clusters(versus_old.counts, margin),
    )


def _slices(
    policy: GatePolicy, levels: Levels, reference: Evaluation, candidate: Evaluation
) -> tuple[SliceJudgment, ...]:
    """Return the figures of each slice. The items of a suite without slices have none."""
    found = []
    for name in _slice_names(candidate):
        old, new = (_only(evaluation, name) for evaluation in (reference, candidate))
        counts = count_pairs(old, new, policy.margin_points / 100)
        compared = _Compared(counts, _score_comparison(policy, levels, counts, old.score))
        required = f"{candidate.suite}/{name}" in policy.required_slices
        found.append(
            SliceJudgment(
                name=name,
                score=new.score,
                versus_old_base=compared.comparison,
                required=required,
                clusters=0 if counts.are_single else counts.clusters,
                items_needed=_items_to_test_loss(policy, levels, compared) if required else 0,
            )
        )
    return tuple(found)


def _suite_items(part: SliceJudgment, versus_old: _Compared) -> int:
    """Return how many items the suite needs so that a slice has the items that it needs."""
    return ceil(part.items_needed * versus_old.counts.items / part.versus_old_base.items)


def _slice_names(evaluation: Evaluation) -> list[str]:
    return sorted({item.slice for item in evaluation.items} - {""})


def _only(evaluation: Evaluation, name: str) -> Evaluation:
    """Return the results of one slice."""
    items = tuple(item for item in evaluation.items if item.slice == name)
    return replace(evaluation, items=items, prefix=None)


def _negative_flips(policy: GatePolicy, levels: Levels, counts: ClusterCounts) -> NegativeFlips:
    limit = policy.max_negative_flip_points
    share = None if limit is None else limit / 100
    lower = 100 * counts.smallest_loss_share(levels.inferiority, limit=share)
    upper = 100 * counts.largest_loss_share(levels.alpha, limit=share)
    return _flips(policy, counts, lower, upper)


def _flips(policy: GatePolicy, counts: ClusterCounts, lower: float, upper: float) -> NegativeFlips:
    limit, (n, losses, _) = policy.max_negative_flip_points, counts.totals
    return NegativeFlips(
        items=losses,
        points=100 * losses / n,
        lower=lower,
        upper=upper,
        below_limit=limit is not None and upper < limit,
        above_limit=limit is not None and lower > limit,
    )


def _clusters(counts: ClusterCounts | DegreeChanges, margin: float) -> dict[str, Any]:
    """Return the fields of a suite's figures about its clusters; empty without clusters."""
    if counts.are_single:
        return {}
    return {"clusters": counts.clusters, "design_effect": float(counts.design_effect(-margin))}


def _score_comparison(
    policy: GatePolicy,
    levels: Levels,
    counts: ClusterCounts | DegreeChanges,
    reference_score: float,
) -> Comparison:
    margin = policy.margin_points
    lower = 100 * counts.lower_bound(levels.alpha)
    upper = 100 * counts.upper_bound(levels.alpha)
    inferiority_bound = 100 * counts.upper_bound(levels.inferiority)
    return Comparison(
        reference_score=reference_score,
        items=counts.items,
        discordant=counts.discordant,
        difference=counts.points,
        lower=lower,
        upper=upper,
        inferiority_bound=inferiority_bound,
        non_inferior=lower > -margin,
        inferior=inferiority_bound < -margin,
        superior=lower > 0,
        reference_non_inferior=upper < margin,
    )


def judge_sequential_suite(policy: GatePolicy, test: SequentialSuiteTest) -> SuiteJudgment:
    """Return the figures of a suite of which at least one item was evaluated sequentially."""
    margin, suite_items = policy.margin_points / 100, len(test.order)
    # The verdict depends on these thresholds: non-inferiority and inferiority to the old base,
    # superiority over the bare base and its non-inferiority.
    versus_old = _betting_comparison(
        policy, test, test.changes, test.reference_score, exact_at=(-margin, -margin)
    )
    versus_bare = None
    if test.bare_differences:
        versus_bare = _betting_comparison(
            policy,
            test,
            test.bare_differences,
            test.score(EvaluatedModel.BARE),
            exact_at=(0.0, margin),
        )
    numbers = test.clusters.numbers[: len(test.changes)]
    counts = ClusterCounts.of(test.changes, numbers)
    independent_items = max(1, int(suite_items / counts.design_effect(-margin)))
    share = counts.discordant / counts.items
    return SuiteJudgment(
        suite=test.suite,
        score=test.score(EvaluatedModel.CANDIDATE),
        versus_old_base=versus_old.comparison,
        power=power_of_betting_test(independent_items, share, margin, test.levels.alpha),
        versus_bare_base=versus_bare and versus_bare.comparison,
        items_needed=_items_needed(policy, test.levels, versus_old, versus_bare, None, counts),
        prefix=Prefix(suite_items, test.seed),
        negative_flips=_betting_flips(policy, test, counts),
        slices=_betting_slices(policy, test),
        **_clusters(counts, margin),
    )


def _betting_comparison(
    policy: GatePolicy,
    test: SequentialSuiteTest,
    differences: Sequence[int],
    reference_score: float,
    *,
    clusters: SuiteClusters | None = None,
    exact_at: tuple[float, float],
) -> _Compared:
    """Compare by bounds that lie beyond `exact_at` (lower, upper) exactly if the tests say so."""
    margin, levels = policy.margin_points / 100, test.levels
    clusters = clusters or test.clusters
    negated = [-difference for difference in differences]
    lower = clusters.lower_limit(differences, exact_at[0], levels.alpha, margin)
    upper = -clusters.lower_limit(negated, -exact_at[1], levels.alpha, margin)
    inferiority_bound = -clusters.lower_limit(negated, margin, levels.inferiority, margin)
    counts = ClusterCounts.of(differences, clusters.numbers[: len(differences)])
    comparison = Comparison(
        reference_score=reference_score,
        items=counts.items,
        discordant=counts.discordant,
        difference=counts.points,
        lower=100 * lower,
        upper=100 * upper,
        inferiority_bound=100 * inferiority_bound,
        non_inferior=lower >= -margin,
        inferior=inferiority_bound <= -margin,
        superior=lower >= 0,
        reference_non_inferior=upper <= margin,
    )
    return _Compared(counts, comparison)


def _betting_slices(policy: GatePolicy, test: SequentialSuiteTest) -> tuple[SliceJudgment, ...]:
    """Return the figures of each slice with evaluated items. No sequential policy requires one."""
    found = []
    margin = policy.margin_points / 100
    for name in sorted({*test.slices} - {""}):
        places = [i for i, of_item in enumerate(test.slices) if of_item == name]
        evaluated = [i for i in places if i < len(test.changes)]
        if not evaluated:
            continue
        changes = [test.changes[i] for i in evaluated]
        reference_score = 100 * sum(test.old[i] for i in evaluated) / len(evaluated)
        compared = _betting_comparison(
            policy,
            test,
            changes,
            reference_score,
            clusters=SuiteClusters([test.clusters.numbers[i] for i in places]),
            exact_at=(-margin, -margin),
        )
        found.append(
            SliceJudgment(
                name=name,
                score=reference_score + compared.counts.points,
                versus_old_base=compared.comparison,
                clusters=0 if compared.counts.are_single else compared.counts.clusters,
            )
        )
    return tuple(found)


def _betting_flips(
    policy: GatePolicy, test: SequentialSuiteTest, counts: ClusterCounts
) -> NegativeFlips:
    limit = policy.max_negative_flip_points
    effect = policy.margin_points / 100 if limit is None else limit / 100
    share = min(counts.totals[1] / counts.items, 0.99) if limit is None else limit / 100
    losses = [int(change < 0) for change in test.changes]
    kept = [-loss for loss in losses]
    lower = test.clusters.lower_limit(losses, share, test.levels.inferiority, effect)
    upper = -test.clusters.lower_limit(kept, -share, test.levels.alpha, effect)
    found = _flips(policy, counts, 100 * max(lower, 0.0), 100 * upper)
    if limit is None:
        return found
    # At the limit itself the bound of a significant test may equal the limit.
    return replace(found, below_limit=100 * upper <= limit, above_limit=lower >= share)


def _items_needed(
    policy: GatePolicy,
    levels: Levels,
    versus_old: _Compared,
    versus_bare: _Compared | None,
    versus_fresh: _Compared | None,
    flips: ClusterCounts,
) -> int:
    """Return how many items would decide all tests of the verdict; 0 if they are decided."""
    needed = [_items_to_test_loss(policy, levels, versus_old)]
    if policy.max_negative_flip_points is not None:
        needed.append(_items_to_test_flips(policy, levels, flips))
    if versus_fresh is not None and policy.must_match_fresh:
        needed.append(_items_to_test_loss(policy, levels, versus_fresh))
    if versus_bare is not None and policy.must_beat_bare:
        needed.append(_items_to_test_bare_base(policy, levels, versus_bare))
    return max(needed)


def _items_to_test_loss(policy: GatePolicy, levels: Levels, compared: _Compared) -> int:
    """Return how many items would show non-inferiority or inferiority."""
    counts, comparison = compared
    if comparison.non_inferior or comparison.inferior:
        return 0
    alpha = levels.alpha if counts.points > -policy.margin_points else levels.inferiority
    return counts.items_to_decide(-policy.margin_points / 100, alpha)


def _items_to_test_flips(policy: GatePolicy, levels: Levels, counts: ClusterCounts) -> int:
    """Return how many items would decide whether negative flips lie below the limit."""
    limit = policy.max_negative_flip_points
    assert limit is not None
    flips = _negative_flips(policy, levels, counts)
    if flips.below_limit or flips.above_limit:
        return 0
    alpha = levels.alpha if flips.points < limit else levels.inferiority
    return counts.only_losses().items_to_decide(-limit / 100, alpha)


def _items_to_test_bare_base(policy: GatePolicy, levels: Levels, compared: _Compared) -> int:
    """Return how many items would show superiority, or non-inferiority of the bare base.

    0 if the adapter scores no higher and the bare base is shown to be non-inferior.
    """
    counts, comparison = compared
    if comparison.superior:
        return 0
    needed = []
    if counts.points > 0:
        needed.append(counts.items_to_decide(0.0, levels.alpha))
    if counts.points < policy.margin_points and not comparison.reference_non_inferior:
        needed.append(counts.items_to_decide(policy.margin_points / 100, levels.alpha))
    return min(needed, default=0)
