"""What the results of one required suite show: four claims, and the figures behind them.

`find` rests on score bounds over all items (`trans_peft.validation.intervals`), `find_early` on
bets over the items asked so far (`trans_peft.validation.betting`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trans_peft.domain.evaluation import Evaluation, GatePolicy, Prefix, SuiteJudgement
from trans_peft.validation.betting import lower_limit, power_by_betting
from trans_peft.validation.intervals import (
    items_to_decide,
    lower_bound,
    power_of_non_inferiority,
    upper_bound,
)
from trans_peft.validation.pairing import Pairs, count_pairs
from trans_peft.validation.sequential import Side, SuiteTest

__all__ = ["Finding", "find", "find_early"]


@dataclass(frozen=True)
class Finding:
    """What is shown about one suite. `items_wanted` is 0 where no more would help.

    `matches_fresh` and `behind_fresh` are both false where no freshly tuned adapter is there to
    compare with.
    """

    figures: SuiteJudgement
    lost_at_least: float
    kept: bool
    lost: bool
    matches_fresh: bool = False
    behind_fresh: bool = False
    behind_at_least: float = 0.0
    beats_bare: bool = False
    bare_as_good: bool = False
    items_wanted: int = 0


def find(
    policy: GatePolicy,
    required_count: int,
    reference: Evaluation,
    candidate: Evaluation,
    bare: Evaluation | None,
    fresh: Evaluation | None = None,
) -> Finding:
    """Return what the bounds say about one suite, all of whose items were answered."""
    alpha, margin = policy.alpha, policy.margin_points / 100
    # Each suite has one way to ask for a re-tune, or two: the loss, and a better fresh adapter.
    ways = required_count * (2 if policy.must_match_fresh and fresh is not None else 1)
    pairs = count_pairs(reference, candidate)
    lower = 100 * lower_bound(*pairs, alpha)
    shared_upper = 100 * upper_bound(*pairs, alpha / ways)
    finding = Finding(
        figures=SuiteJudgement(
            suite=reference.suite,
            items=pairs.n,
            reference=reference.score,
            score=candidate.score,
            bare=None,
            difference=pairs.points,
            lower=lower,
            upper=100 * upper_bound(*pairs, alpha),
            discordant=pairs.discordant,
            power=power_of_non_inferiority(pairs.n, pairs.discordant / pairs.n, margin, alpha),
        ),
        lost_at_least=-shared_upper,
        kept=lower > -policy.margin_points,
        lost=shared_upper < -policy.margin_points,
    )
    finding = _with_wanted(finding, policy, pairs, alpha / ways)
    if fresh is not None:
        over_fresh = count_pairs(fresh, candidate)
        finding = _with_fresh(finding, policy, over_fresh, fresh.score, alpha / ways)
    if bare is None:
        return finding
    over = count_pairs(bare, candidate)
    lower = 100 * lower_bound(*over, alpha)
    upper = 100 * upper_bound(*over, alpha)
    finding = replace(finding, beats_bare=lower > 0, bare_as_good=upper < policy.margin_points)
    return _with_bare(finding, policy, over, bare.score, lower, upper)


def find_early(policy: GatePolicy, test: SuiteTest) -> Finding:
    """Return what the bets say about one suite, of which at least one item was asked."""
    alpha, margin, n = policy.alpha, policy.margin_points / 100, len(test.order)

    def limit(x: Sequence[int], edge: float, level: float = alpha) -> float:
        return 100 * lower_limit(x, edge, items=n, alpha=level, effect=margin)

    pairs, losses = _pairs(test.changes), [-change for change in test.changes]
    finding = Finding(
        figures=SuiteJudgement(
            suite=test.suite,
            items=pairs.n,
            reference=test.reference_score,
            score=test.score(Side.CANDIDATE),
            bare=None,
            difference=pairs.points,
            lower=limit(test.changes, -margin),
            upper=-limit(losses, margin),
            discordant=pairs.discordant,
            power=power_by_betting(n, pairs.discordant / pairs.n, margin, alpha),
            prefix=Prefix(n, test.seed),
        ),
        lost_at_least=limit(losses, margin, test.lost.alpha),
        kept=bool(test.kept.shown),
        lost=bool(test.lost.shown),
    )
    finding = _with_wanted(finding, policy, pairs, test.lost.alpha)
    if not test.over_bare:
        return finding
    lower = limit(test.over_bare, 0.0)
    upper = -limit([-over for over in test.over_bare], -margin)
    finding = replace(
        finding, beats_bare=bool(test.better.shown), bare_as_good=bool(test.idle.shown)
    )
    over = _pairs(test.over_bare)
    return _with_bare(finding, policy, over, test.score(Side.BARE), lower, upper)


def _pairs(changes: Sequence[int]) -> Pairs:
    return Pairs(len(changes), changes.count(-1), changes.count(1))


def _with_wanted(
    finding: Finding, policy: GatePolicy, pairs: Pairs, shared_alpha: float
) -> Finding:
    if finding.kept or finding.lost:
        return finding
    level = policy.alpha if pairs.points > -policy.margin_points else shared_alpha
    return replace(
        finding, items_wanted=items_to_decide(*pairs, -policy.margin_points / 100, level)
    )


def _with_fresh(
    finding: Finding, policy: GatePolicy, over: Pairs, fresh_score: float, shared_alpha: float
) -> Finding:
    lower = 100 * lower_bound(*over, policy.alpha)
    shared_upper = 100 * upper_bound(*over, shared_alpha)
    finding = replace(
        finding,
        matches_fresh=lower > -policy.margin_points,
        behind_fresh=shared_upper < -policy.margin_points,
        behind_at_least=-shared_upper,
        figures=replace(
            finding.figures,
            fresh=fresh_score,
            over_fresh=over.points,
            over_fresh_lower=lower,
            over_fresh_upper=100 * upper_bound(*over, policy.alpha),
        ),
    )
    if finding.matches_fresh or finding.behind_fresh or not policy.must_match_fresh:
        return finding
    level = policy.alpha if over.points > -policy.margin_points else shared_alpha
    wanted = items_to_decide(*over, -policy.margin_points / 100, level)
    return replace(finding, items_wanted=max(finding.items_wanted, wanted))


def _with_bare(
    finding: Finding,
    policy: GatePolicy,
    over: Pairs,
    bare_score: float,
    lower: float,
    upper: float,
) -> Finding:
    finding = replace(
        finding,
        figures=replace(
            finding.figures,
            bare=bare_score,
            over_bare=over.points,
            over_bare_lower=lower,
            over_bare_upper=upper,
        ),
    )
    if finding.beats_bare or not policy.must_beat_bare:
        return finding
    wanted = _items_to_settle_bare(over, policy, finding.bare_as_good)
    return replace(finding, items_wanted=max(finding.items_wanted, wanted))


def _items_to_settle_bare(over: Pairs, policy: GatePolicy, bare_as_good: bool) -> int:
    """How many items would show the adapter to be better, or else the bare base to be as good."""
    ways = []
    if over.points > 0:
        ways.append(items_to_decide(*over, 0.0, policy.alpha))
    if over.points < policy.margin_points and not bare_as_good:
        ways.append(items_to_decide(*over, policy.margin_points / 100, policy.alpha))
    return min(ways, default=0)
