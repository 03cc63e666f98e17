"""The gate: what follows for one adapter on one new base, from results compared item by item.

Every bound is a one-sided score bound for paired proportions (`trans_peft.validation.intervals`).
docs/verdicts.md explains the table of verdicts. `incompatible` and `failed` are no matter of
statistics and come from elsewhere.

Levels. Passing and retiring claim something of every required suite, so each bound stands at the
policy's alpha without correction (an intersection-union test). Re-tuning claims something of at
least one suite, so its bounds share alpha (Holm's first step). With one suite they are the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from trans_peft.domain.evaluation import (
    Evaluation,
    GatePolicy,
    Judgement,
    SuiteJudgement,
    Verdict,
)
from trans_peft.validation.intervals import (
    items_to_decide,
    lower_bound,
    power_of_non_inferiority,
    upper_bound,
)
from trans_peft.validation.pairing import Pairs, check_comparable, count_pairs

__all__ = ["judge"]


@dataclass(frozen=True)
class _Finding:
    """What the bounds say about one suite. `items_wanted` is 0 where no more would help."""

    figures: SuiteJudgement
    lost_at_least: float
    kept: bool
    lost: bool
    beats_bare: bool = False
    bare_as_good: bool = False
    items_wanted: int = 0


def judge(
    policy: GatePolicy,
    reference: Mapping[str, Evaluation],
    candidate: Mapping[str, Evaluation],
    bare: Mapping[str, Evaluation],
) -> Judgement:
    """Return the verdict on an adapter, its reason in words and the figures of every suite.

    Each mapping goes from a suite's name to a result: `reference` of the adapter on the base it was
    trained on, `candidate` of the adapter on the new base, `bare` of the new base without it. The
    last may lack a suite only if the policy does not ask the adapter to beat it. Suites that the
    policy does not require are reported and decide nothing. InvalidSpecError, with all reasons,
    where results cannot be compared.
    """
    required = tuple(dict.fromkeys(policy.required_suites)) or tuple(sorted(reference))
    check_comparable(required, reference, candidate, bare, bare_required=policy.must_beat_bare)

    def find(name: str) -> _Finding:
        return _find(policy, len(required), reference[name], candidate[name], bare.get(name))

    deciding = [find(name) for name in required]
    guarding = [find(name) for name in sorted(set(reference) - set(required))]
    verdict = _verdict(policy, deciding)
    if verdict is Verdict.INCONCLUSIVE:
        deciding = [_with_more_items(finding) for finding in deciding]
    return Judgement(
        verdict,
        _reason(policy, verdict, deciding, guarding),
        tuple(finding.figures for finding in [*deciding, *guarding]),
    )


def _verdict(policy: GatePolicy, deciding: list[_Finding]) -> Verdict:
    if all(f.kept and (f.beats_bare or not policy.must_beat_bare) for f in deciding):
        return Verdict.PASSED
    if any(f.lost for f in deciding):
        return Verdict.NEEDS_RETUNING
    if all(f.bare_as_good for f in deciding):
        return Verdict.RETIRE
    return Verdict.INCONCLUSIVE


def _find(
    policy: GatePolicy,
    required_count: int,
    reference: Evaluation,
    candidate: Evaluation,
    bare: Evaluation | None,
) -> _Finding:
    alpha, margin = policy.alpha, policy.margin_points / 100
    pairs = count_pairs(reference, candidate)
    lower = 100 * lower_bound(*pairs, alpha)
    shared_upper = 100 * upper_bound(*pairs, alpha / required_count)
    finding = _Finding(
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
    if not finding.kept and not finding.lost:
        level = alpha if pairs.points > -policy.margin_points else alpha / required_count
        finding = replace(finding, items_wanted=items_to_decide(*pairs, -margin, level))
    return finding if bare is None else _with_bare(finding, policy, candidate, bare)


def _with_bare(
    finding: _Finding, policy: GatePolicy, candidate: Evaluation, bare: Evaluation
) -> _Finding:
    over = count_pairs(bare, candidate)
    lower = 100 * lower_bound(*over, policy.alpha)
    upper = 100 * upper_bound(*over, policy.alpha)
    finding = replace(
        finding,
        figures=replace(
            finding.figures,
            bare=bare.score,
            over_bare=over.points,
            over_bare_lower=lower,
            over_bare_upper=upper,
        ),
        beats_bare=lower > 0,
        bare_as_good=upper < policy.margin_points,
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


def _with_more_items(finding: _Finding) -> _Finding:
    more = max(finding.items_wanted - finding.figures.items, 0)
    return replace(finding, figures=replace(finding.figures, more_items=more))


# The reason, in words.


def _reason(
    policy: GatePolicy, verdict: Verdict, deciding: list[_Finding], guarding: list[_Finding]
) -> str:
    if verdict is Verdict.PASSED:
        told = [_kept_words(policy, f.figures) for f in deciding]
    elif verdict is Verdict.NEEDS_RETUNING:
        told = [_lost_words(policy, f) for f in deciding if f.lost]
    elif verdict is Verdict.RETIRE:
        told = [_retire_words(policy, f.figures) for f in deciding]
    else:
        told = [words for f in deciding if (words := _open_words(policy, f))]
        if not any(f.items_wanted for f in deciding):
            told.append(
                "the adapter is no better than the bare new base on some required suites and "
                "better on others: more items will not decide that, a person must"
            )
    told += [f"not required, but {_lost_words(policy, f)}" for f in guarding if f.lost]
    return f"{'; '.join(told)} (one-sided level {100 * policy.alpha:g} %)"


def _scores(s: SuiteJudgement) -> str:
    return (
        f"{s.suite}: {s.reference:.1f} on the base it was trained on, "
        f"{s.score:.1f} on the new one, {s.items} items"
    )


def _kept_words(policy: GatePolicy, s: SuiteJudgement) -> str:
    change = "lost at most" if s.lower < 0 else "gained at least"
    words = f"{_scores(s)}; {change} {abs(s.lower):.2f} points, margin {policy.margin_points:g}"
    if s.bare is not None and s.over_bare_lower is not None and s.over_bare_lower > 0:
        words += f"; at least {s.over_bare_lower:.2f} better than the bare new base ({s.bare:.1f})"
    return words


def _lost_words(policy: GatePolicy, f: _Finding) -> str:
    return (
        f"{_scores(f.figures)}; lost at least {f.lost_at_least:.2f} points, "
        f"margin {policy.margin_points:g}"
    )


def _retire_words(policy: GatePolicy, s: SuiteJudgement) -> str:
    over = s.over_bare_upper or 0.0
    gap = f"at most {over:.2f} points worse" if over > 0 else f"at least {-over:.2f} points better"
    return (
        f"{_scores(s)}; the bare new base has {s.bare:.1f} without the adapter, {gap}, "
        f"margin {policy.margin_points:g}"
    )


def _open_words(policy: GatePolicy, f: _Finding) -> str:
    s = f.figures
    told = []
    if not f.kept and not f.lost:
        told.append(
            f"the change lies between {s.lower:+.2f} and {s.upper:+.2f} points, which leaves the "
            f"margin of {policy.margin_points:g} open (power at no loss {100 * s.power:.0f} %)"
        )
    if policy.must_beat_bare and not f.beats_bare:
        told.append(
            f"against the bare new base ({s.bare:.1f}) it lies between {s.over_bare_lower:+.2f} "
            f"and {s.over_bare_upper:+.2f}"
        )
    if s.more_items:
        told.append(f"about {s.more_items:,} more items would decide")
    return f"{_scores(s)}; {', '.join(told)}" if told else ""
