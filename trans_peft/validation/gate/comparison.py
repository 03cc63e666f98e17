"""Compare the adapter on a new base with its references, on one suite.

`judge_suite` uses Tango's score bounds on all items (`trans_peft.validation.statistics.intervals`).
`judge_sequential_suite` uses betting tests on the items evaluated so far
(`trans_peft.validation.statistics.betting`).
"""

from collections.abc import Sequence
from typing import NamedTuple

from trans_peft.domain.evaluation import (
    Comparison,
    Evaluation,
    GatePolicy,
    Levels,
    Prefix,
    SuiteJudgment,
)
from trans_peft.validation.statistics.betting import lower_confidence_limit, power_of_betting_test
from trans_peft.validation.statistics.intervals import (
    items_to_decide,
    lower_bound,
    power_of_non_inferiority,
    upper_bound,
)
from trans_peft.validation.statistics.pairing import Pairs, count_pairs
from trans_peft.validation.statistics.sequential import EvaluatedModel, SequentialSuiteTest

__all__ = ["judge_sequential_suite", "judge_suite"]


class _Compared(NamedTuple):
    pairs: Pairs
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
    levels = policy.levels(required_count * (2 if has_fresh_test else 1))

    def compared_with(other: Evaluation) -> _Compared:
        pairs = count_pairs(other, candidate)
        return _Compared(pairs, _score_comparison(policy, levels, pairs, other.score))

    versus_old = compared_with(reference)
    versus_bare = compared_with(bare) if bare is not None else None
    versus_fresh = compared_with(fresh) if fresh is not None else None
    n, discordant = versus_old.pairs.n, versus_old.pairs.discordant
    return SuiteJudgment(
        suite=reference.suite,
        score=candidate.score,
        versus_old_base=versus_old.comparison,
        power=power_of_non_inferiority(n, discordant / n, policy.margin_points / 100, levels.alpha),
        versus_bare_base=versus_bare and versus_bare.comparison,
        versus_fresh_adapter=versus_fresh and versus_fresh.comparison,
        items_needed=_items_needed(policy, levels, versus_old, versus_bare, versus_fresh),
    )


def _score_comparison(
    policy: GatePolicy, levels: Levels, pairs: Pairs, reference_score: float
) -> Comparison:
    margin = policy.margin_points
    lower = 100 * lower_bound(*pairs, levels.alpha)
    upper = 100 * upper_bound(*pairs, levels.alpha)
    inferiority_bound = 100 * upper_bound(*pairs, levels.inferiority)
    return Comparison(
        reference_score=reference_score,
        items=pairs.n,
        discordant=pairs.discordant,
        difference=pairs.points,
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
    n, discordant = versus_old.pairs.n, versus_old.pairs.discordant
    return SuiteJudgment(
        suite=test.suite,
        score=test.score(EvaluatedModel.CANDIDATE),
        versus_old_base=versus_old.comparison,
        power=power_of_betting_test(suite_items, discordant / n, margin, test.levels.alpha),
        versus_bare_base=versus_bare and versus_bare.comparison,
        items_needed=_items_needed(policy, test.levels, versus_old, versus_bare, None),
        prefix=Prefix(suite_items, test.seed),
    )


def _betting_comparison(
    policy: GatePolicy,
    test: SequentialSuiteTest,
    differences: Sequence[int],
    reference_score: float,
    *,
    exact_at: tuple[float, float],
) -> _Compared:
    """Compare by bounds that lie beyond `exact_at` (lower, upper) exactly if the tests say so."""
    margin, levels = policy.margin_points / 100, test.levels
    negated = [-difference for difference in differences]

    def limit(values: Sequence[int], threshold: float, alpha: float) -> float:
        return lower_confidence_limit(
            values, threshold, items=len(test.order), alpha=alpha, effect=margin
        )

    lower = limit(differences, exact_at[0], levels.alpha)
    upper = -limit(negated, -exact_at[1], levels.alpha)
    inferiority_bound = -limit(negated, margin, levels.inferiority)
    pairs = Pairs(len(differences), differences.count(-1), differences.count(1))
    comparison = Comparison(
        reference_score=reference_score,
        items=pairs.n,
        discordant=pairs.discordant,
        difference=pairs.points,
        lower=100 * lower,
        upper=100 * upper,
        inferiority_bound=100 * inferiority_bound,
        non_inferior=lower >= -margin,
        inferior=inferiority_bound <= -margin,
        superior=lower >= 0,
        reference_non_inferior=upper <= margin,
    )
    return _Compared(pairs, comparison)


def _items_needed(
    policy: GatePolicy,
    levels: Levels,
    versus_old: _Compared,
    versus_bare: _Compared | None,
    versus_fresh: _Compared | None,
) -> int:
    """Return how many items would decide all tests of the verdict; 0 if they are decided."""
    needed = [_items_to_test_loss(policy, levels, versus_old)]
    if versus_fresh is not None and policy.must_match_fresh:
        needed.append(_items_to_test_loss(policy, levels, versus_fresh))
    if versus_bare is not None and policy.must_beat_bare:
        needed.append(_items_to_test_bare_base(policy, levels, versus_bare))
    return max(needed)


def _items_to_test_loss(policy: GatePolicy, levels: Levels, compared: _Compared) -> int:
    """Return how many items would show non-inferiority or inferiority."""
    pairs, comparison = compared
    if comparison.non_inferior or comparison.inferior:
        return 0
    alpha = levels.alpha if pairs.points > -policy.margin_points else levels.inferiority
    return items_to_decide(*pairs, -policy.margin_points / 100, alpha)


def _items_to_test_bare_base(policy: GatePolicy, levels: Levels, compared: _Compared) -> int:
    """Return how many items would show superiority, or non-inferiority of the bare base.

    0 if the adapter scores no higher and the bare base is shown to be non-inferior.
    """
    pairs, comparison = compared
    if comparison.superior:
        return 0
    needed = []
    if pairs.points > 0:
        needed.append(items_to_decide(*pairs, 0.0, levels.alpha))
    if pairs.points < policy.margin_points and not comparison.reference_non_inferior:
        needed.append(items_to_decide(*pairs, policy.margin_points / 100, levels.alpha))
    return min(needed, default=0)
