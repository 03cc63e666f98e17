"""The gate: what follows for one adapter on one new base, from results compared item by item.

Every bound is a one-sided score bound for paired proportions
(`trans_peft.validation.statistics.intervals`). docs/verdicts.md explains the table of verdicts.
`incompatible` and `failed` are no matter of statistics and come from elsewhere.

Under a sequential policy the claims are shown by betting instead, on as many items as it took
(`trans_peft.validation.statistics.sequential`); the table of verdicts and the levels are the same.

Levels. Passing and retiring claim something of every required suite, so each bound stands at the
policy's alpha without correction (an intersection-union test). Re-tuning claims something of at
least one suite, so its bounds share alpha (Holm's first step). With one suite they are the same.
A freshly tuned adapter, where there is one, is a second reference on the new base: reported beside,
and asked for in a pass only if the policy says so.
"""

from collections.abc import Mapping
from dataclasses import replace

from trans_peft.domain.evaluation import (
    Evaluation,
    GatePolicy,
    Judgement,
    SuiteJudgement,
    Verdict,
)
from trans_peft.validation.gate.suite_findings import SuiteFinding, find, find_sequential
from trans_peft.validation.statistics.intervals import items_to_decide
from trans_peft.validation.statistics.pairing import check_comparable
from trans_peft.validation.statistics.sequential import replay

__all__ = ["judge"]

_SUPPOSED = (200, 15, 15)
"""Items and discordant pairs of a suite of which nothing is known (betting supposes the same)."""


def judge(
    policy: GatePolicy,
    reference: Mapping[str, Evaluation],
    candidate: Mapping[str, Evaluation],
    bare: Mapping[str, Evaluation],
    fresh: Mapping[str, Evaluation] | None = None,
) -> Judgement:
    """Return the verdict on an adapter, its reason in words and the figures of every suite.

    Each mapping goes from a suite's name to a result: `reference` of the adapter on the base it was
    trained on, `candidate` of the adapter on the new base, `bare` of the new base without it (it
    may lack a suite only if the policy does not ask the adapter to beat it), `fresh` of an adapter
    that was tuned on the new base, where there is one. Suites that the policy does not require are
    reported and decide nothing. Under a sequential policy the results on the new base may be parts
    of a suite, or missing where nothing had to be asked. InvalidSpecError, with all reasons, where
    results cannot be compared.
    """
    fresh = fresh or {}
    required = policy.requires(reference)
    check_comparable(
        required,
        reference,
        candidate,
        bare,
        fresh,
        bare_required=policy.must_beat_bare,
        partial=required if policy.sequential else (),
    )

    def found(name: str) -> SuiteFinding:
        arms = reference[name], candidate[name], bare.get(name), fresh.get(name)
        return find(policy, len(required), *arms)

    if policy.sequential:
        gate = replay(policy, reference, candidate, bare)
        verdict = gate.verdict
        deciding = [find_sequential(policy, test) for test in gate.suites.values() if test.changes]
    else:
        deciding = [found(name) for name in required]
        verdict = _verdict(policy, deciding)
    guarding = [found(name) for name in sorted(set(reference) - set(required))]
    if verdict is Verdict.INCONCLUSIVE:
        deciding = [_with_more_items(finding) for finding in deciding]
    return Judgement(
        verdict,
        _reason(policy, verdict, deciding, guarding),
        tuple(finding.figures for finding in [*deciding, *guarding]),
    )


def _verdict(policy: GatePolicy, deciding: list[SuiteFinding]) -> Verdict:
    if all(
        f.non_inferior
        and (f.superior_to_bare or not policy.must_beat_bare)
        and (f.non_inferior_to_fresh or not policy.must_match_fresh)
        for f in deciding
    ):
        return Verdict.PASSED
    if any(f.inferior or (policy.must_match_fresh and f.inferior_to_fresh) for f in deciding):
        return Verdict.NEEDS_RETUNING
    if all(f.bare_non_inferior for f in deciding):
        return Verdict.RETIRE
    return Verdict.INCONCLUSIVE


def _with_more_items(finding: SuiteFinding) -> SuiteFinding:
    figures = finding.figures
    there = figures.prefix.of if figures.prefix else figures.items
    more = max(finding.items_needed - there, 0)
    return replace(finding, figures=replace(finding.figures, more_items=more))


# The reason, in words.


def _reason(
    policy: GatePolicy, verdict: Verdict, deciding: list[SuiteFinding], guarding: list[SuiteFinding]
) -> str:
    if verdict is Verdict.PASSED:
        told = [_kept_words(policy, f.figures) for f in deciding]
    elif verdict is Verdict.NEEDS_RETUNING:
        told = [_lost_words(policy, f) for f in deciding if f.inferior]
        if policy.must_match_fresh:
            told += [_behind_words(policy, f) for f in deciding if f.inferior_to_fresh]
    elif verdict is Verdict.RETIRE:
        told = [_retire_words(policy, f.figures) for f in deciding]
    else:
        told = [words for f in deciding if (words := _open_words(policy, f))]
        if not deciding:
            n, b, c = _SUPPOSED
            wanted = items_to_decide(n, b, c, -policy.margin_points / 100, policy.alpha)
            told.append(
                "nothing was asked: so few items give no verdict much of a chance; about "
                f"{wanted:,} would, where nothing was lost and {(b + c) / n:.0%} of pairs differ"
            )
        elif policy.must_match_fresh and any(f.figures.fresh is None for f in deciding):
            told.append(
                "the policy asks for a comparison with an adapter tuned on the new base, and there "
                "is none: tune one, or judge by a policy that does not ask"
            )
        elif not any(f.items_needed for f in deciding):
            told.append(
                "the adapter is no better than the bare new base on some required suites and "
                "better on others: more items will not decide that, a person must"
            )
        if any(f.figures.prefix and f.figures.items < f.figures.prefix.of for f in deciding):
            told.append("asking was stopped, because no verdict had much of a chance any more")
    told += [f"not required, but {_lost_words(policy, f)}" for f in guarding if f.inferior]
    how = "sequential, " if policy.sequential else ""
    return f"{'; '.join(told)} ({how}one-sided level {100 * policy.alpha:g} %)"


def _scores(s: SuiteJudgement) -> str:
    items = f"{s.items} of {s.prefix.of} items" if s.prefix else f"{s.items} items"
    return (
        f"{s.suite}: {s.reference:.1f} on the base it was trained on, "
        f"{s.score:.1f} on the new one, {items}"
    )


def _kept_words(policy: GatePolicy, s: SuiteJudgement) -> str:
    change = "lost at most" if s.lower < 0 else "gained at least"
    words = f"{_scores(s)}; {change} {abs(s.lower):.2f} points, margin {policy.margin_points:g}"
    if s.bare is not None and s.over_bare_lower is not None and s.over_bare_lower > 0:
        words += f"; at least {s.over_bare_lower:.2f} better than the bare new base ({s.bare:.1f})"
    if s.fresh is not None:
        words += f"; an adapter tuned on the new base has {s.fresh:.1f}"
    return words


def _lost_words(policy: GatePolicy, f: SuiteFinding) -> str:
    return (
        f"{_scores(f.figures)}; lost at least {f.loss_lower_bound:.2f} points, "
        f"margin {policy.margin_points:g}"
    )


def _behind_words(policy: GatePolicy, f: SuiteFinding) -> str:
    return (
        f"{_scores(f.figures)}; an adapter tuned on the new base has {f.figures.fresh:.1f}, at "
        f"least {f.fresh_gain_lower_bound:.2f} points more, margin {policy.margin_points:g}"
    )


def _retire_words(policy: GatePolicy, s: SuiteJudgement) -> str:
    over = s.over_bare_upper or 0.0
    gap = f"at most {over:.2f} points worse" if over > 0 else f"at least {-over:.2f} points better"
    return (
        f"{_scores(s)}; the bare new base has {s.bare:.1f} without the adapter, {gap}, "
        f"margin {policy.margin_points:g}"
    )


def _open_words(policy: GatePolicy, f: SuiteFinding) -> str:
    s = f.figures
    told = []
    if not f.non_inferior and not f.inferior:
        told.append(
            f"the change lies between {s.lower:+.2f} and {s.upper:+.2f} points, which leaves the "
            f"margin of {policy.margin_points:g} open (power at no loss {100 * s.power:.0f} %)"
        )
    if policy.must_beat_bare and not f.superior_to_bare and s.bare is not None:
        told.append(
            f"against the bare new base ({s.bare:.1f}) it lies between {s.over_bare_lower:+.2f} "
            f"and {s.over_bare_upper:+.2f}"
        )
    if policy.must_match_fresh and not f.non_inferior_to_fresh and s.fresh is not None:
        told.append(
            f"against an adapter tuned on the new base ({s.fresh:.1f}) it lies between "
            f"{s.over_fresh_lower:+.2f} and {s.over_fresh_upper:+.2f}"
        )
    if s.more_items:
        told.append(f"about {s.more_items:,} more items would decide")
    return f"{_scores(s)}; {', '.join(told)}" if told else ""
