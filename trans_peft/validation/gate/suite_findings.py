"""What the results of one required suite show: four claims, and the figures behind them.

`find` rests on score bounds over all items (`trans_peft.validation.statistics.intervals`),
`find_sequential` on bets over the items asked so far (`trans_peft.validation.statistics.betting`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trans_peft.domain.evaluation import Evaluation, GatePolicy, Prefix, SuiteJudgement
from trans_peft.validation.statistics.betting import lower_confidence_limit, power_of_betting
from trans_peft.validation.statistics.intervals import (
    items_to_decide,
    lower_bound,
    power_of_non_inferiority,
    upper_bound,
)
from trans_peft.validation.statistics.pairing import Pairs, count_pairs
from trans_peft.validation.statistics.sequential import Arm, SequentialSuiteTest

__all__ = ["SuiteFinding", "find", "find_sequential"]


@dataclass(frozen=True)
class SuiteFinding:
    """What is shown about one suite. `items_needed` is 0 where no more would help.

    `non_inferior_to_fresh` and `inferior_to_fresh` are both false where no freshly tuned adapter is
    there to compare with.
    """

    figures: SuiteJudgement
    loss_lower_bound: float
    non_inferior: bool
    inferior: bool
    non_inferior_to_fresh: bool = False
    inferior_to_fresh: bool = False
    fresh_gain_lower_bound: float = 0.0
    superior_to_bare: bool = False
    bare_non_inferior: bool = False
    items_needed: int = 0


def find(
    policy: GatePolicy,
    required_count: int,
    reference: Evaluation,
    candidate: Evaluation,
    bare: Evaluation | None,
    fresh: Evaluation | None = None,
) -> SuiteFinding:
    """Return what the bounds say about one suite, all of whose items were answered."""
    alpha, margin = policy.alpha, policy.margin_points / 100
    # Each suite has one way to ask for a re-tune, or two: the loss, and a better fresh adapter.
    ways = required_count * (2 if policy.must_match_fresh and fresh is not None else 1)
    pairs = count_pairs(reference, candidate)
    lower = 100 * lower_bound(*pairs, alpha)
    shared_upper = 100 * upper_bound(*pairs, alpha / ways)
    finding = SuiteFinding(
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
        loss_lower_bound=-shared_upper,
        non_inferior=lower > -policy.margin_points,
        inferior=shared_upper < -policy.margin_points,
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
    finding = replace(
        finding, superior_to_bare=lower > 0, bare_non_inferior=upper < policy.margin_points
    )
    return _with_bare(finding, policy, over, bare.score, lower, upper)


def find_sequential(policy: GatePolicy, test: SequentialSuiteTest) -> SuiteFinding:
    """Return what the bets say about one suite, of which at least one item was asked."""
    alpha, margin, n = policy.alpha, policy.margin_points / 100, len(test.order)

    def limit(x: Sequence[int], edge: float, level: float = alpha) -> float:
        return 100 * lower_confidence_limit(x, edge, items=n, alpha=level, effect=margin)

    pairs, losses = _pairs(test.changes), [-change for change in test.changes]
    finding = SuiteFinding(
        figures=SuiteJudgement(
            suite=test.suite,
            items=pairs.n,
            reference=test.reference_score,
            score=test.score(Arm.CANDIDATE),
            bare=None,
            difference=pairs.points,
            lower=limit(test.changes, -margin),
            upper=-limit(losses, margin),
            discordant=pairs.discordant,
            power=power_of_betting(n, pairs.discordant / pairs.n, margin, alpha),
            prefix=Prefix(n, test.seed),
        ),
        loss_lower_bound=limit(losses, margin, test.inferior.alpha),
        non_inferior=bool(test.non_inferior.is_significant),
        inferior=bool(test.inferior.is_significant),
    )
    finding = _with_wanted(finding, policy, pairs, test.inferior.alpha)
    if not test.over_bare:
        return finding
    lower = limit(test.over_bare, 0.0)
    upper = -limit([-over for over in test.over_bare], -margin)
    finding = replace(
        finding,
        superior_to_bare=bool(test.superior.is_significant),
        bare_non_inferior=bool(test.baseline_non_inferior.is_significant),
    )
    over = _pairs(test.over_bare)
    return _with_bare(finding, policy, over, test.score(Arm.BARE), lower, upper)


def _pairs(changes: Sequence[int]) -> Pairs:
    return Pairs(len(changes), changes.count(-1), changes.count(1))


def _with_wanted(
    finding: SuiteFinding, policy: GatePolicy, pairs: Pairs, shared_alpha: float
) -> SuiteFinding:
    if finding.non_inferior or finding.inferior:
        return finding
    level = policy.alpha if pairs.points > -policy.margin_points else shared_alpha
    return replace(
        finding, items_needed=items_to_decide(*pairs, -policy.margin_points / 100, level)
    )


def _with_fresh(
    finding: SuiteFinding, policy: GatePolicy, over: Pairs, fresh_score: float, shared_alpha: float
) -> SuiteFinding:
    lower = 100 * lower_bound(*over, policy.alpha)
    shared_upper = 100 * upper_bound(*over, shared_alpha)
    finding = replace(
        finding,
        non_inferior_to_fresh=lower > -policy.margin_points,
        inferior_to_fresh=shared_upper < -policy.margin_points,
        fresh_gain_lower_bound=-shared_upper,
        figures=replace(
            finding.figures,
            fresh=fresh_score,
            over_fresh=over.points,
            over_fresh_lower=lower,
            over_fresh_upper=100 * upper_bound(*over, policy.alpha),
        ),
    )
    if finding.non_inferior_to_fresh or finding.inferior_to_fresh or not policy.must_match_fresh:
        return finding
    level = policy.alpha if over.points > -policy.margin_points else shared_alpha
    wanted = items_to_decide(*over, -policy.margin_points / 100, level)
    return replace(finding, items_needed=max(finding.items_needed, wanted))


def _with_bare(
    finding: SuiteFinding,
    policy: GatePolicy,
    over: Pairs,
    bare_score: float,
    lower: float,
    upper: float,
) -> SuiteFinding:
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
    if finding.superior_to_bare or not policy.must_beat_bare:
        return finding
    wanted = _items_to_settle_bare(over, policy, finding.bare_non_inferior)
    return replace(finding, items_needed=max(finding.items_needed, wanted))


def _items_to_settle_bare(over: Pairs, policy: GatePolicy, bare_non_inferior: bool) -> int:
    """How many items would show the adapter to be better, or else the bare base to be as good."""
    ways = []
    if over.points > 0:
        ways.append(items_to_decide(*over, 0.0, policy.alpha))
    if over.points < policy.margin_points and not bare_non_inferior:
        ways.append(items_to_decide(*over, policy.margin_points / 100, policy.alpha))
    return min(ways, default=0)
