"""The table of verdicts: which test results lead to which verdict.

docs/verdicts.md explains the table. The verdicts `incompatible` and `failed` do not depend on
statistics and are set elsewhere (`trans_peft.lifecycle.transfer`).

Levels. `passed` and `retire` require a significant test on every required suite, so each test is
run at the policy's `alpha` without correction (an intersection-union test). For `needs-retuning`
one significant inferiority test is enough, so the inferiority tests share `alpha` (the first step
of Holm's method).

All suites have the same levels. `GatePolicy.levels` (`trans_peft.domain.evaluation`) returns them:
all bounds, tests, powers and item counts use its result.

Sequential policies use betting tests on as many items as the verdict needs
(`trans_peft.validation.statistics.sequential`). The table and the levels are the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from trans_peft.domain.evaluation import (
    Evaluation,
    GatePolicy,
    Judgment,
    SuiteJudgment,
    Verdict,
)
from trans_peft.validation.gate.comparison import judge_sequential_suite, judge_suite
from trans_peft.validation.gate.reason import reason
from trans_peft.validation.statistics.pairing import (
    check_comparable,
    check_flips,
    check_slices,
)
from trans_peft.validation.statistics.sequential import replay

__all__ = ["judge"]


def judge(
    policy: GatePolicy,
    reference: Mapping[str, Evaluation],
    candidate: Mapping[str, Evaluation],
    bare: Mapping[str, Evaluation],
    fresh: Mapping[str, Evaluation] | None = None,
) -> Judgment:
    """Return the verdict on an adapter on a new base, with its reason and the figures.

    Suites that the policy does not require are compared as well, but do not affect the verdict.

    Args:
        policy: the margin, the level and the required suites.
        reference: results of the adapter on the base that it was trained on, by suite name.
        candidate: results of the adapter on the new base, by suite name. A sequential policy
            accepts parts of required suites, and suites that needed no evaluation may be missing.
        bare: results of the new base without an adapter, by suite name. May lack suites if the
            policy does not set `must_beat_bare`; parts are accepted as for `candidate`.
        fresh: results of an adapter that was tuned on the new base, by suite name.

    Raises:
        InvalidSpecError: results cannot be compared. The message lists all reasons.
    """
    fresh = fresh or {}
    required = policy.requires(reference)
    check_slices(policy, reference)
    check_flips(policy, reference)
    check_comparable(
        required,
        reference,
        candidate,
        bare,
        fresh,
        bare_required=policy.must_beat_bare,
        partial=required if policy.sequential else (),
    )

    def judge_whole(suite: str) -> SuiteJudgment:
        return judge_suite(
            policy,
            len(required),
            reference[suite],
            candidate[suite],
            bare.get(suite),
            fresh.get(suite),
        )

    e_value = None
    if policy.sequential:
        gate = replay(policy, reference, candidate, bare)
        verdict, e_value = gate.verdict, gate.smallest_wealth / policy.alpha
        deciding = [
            judge_sequential_suite(policy, test) for test in gate.suites.values() if test.changes
        ]
    else:
        deciding = [judge_whole(suite) for suite in required]
        verdict = _verdict(policy, deciding)
    if verdict is not Verdict.INCONCLUSIVE:
        deciding = [_without_estimates(suite) for suite in deciding]
    other = [
        _without_estimates(judge_whole(suite)) for suite in sorted(set(reference) - {*required})
    ]
    suites = (replace(one, engine=reference[one.suite].engine) for one in (*deciding, *other))
    return Judgment(
        verdict,
        reason(policy, verdict, deciding, other),
        tuple(suites),
        margin_points=policy.margin_points,
        alpha=policy.alpha,
        e_value=e_value,
    )


def _without_estimates(suite: SuiteJudgment) -> SuiteJudgment:
    slices = tuple(replace(part, items_needed=0) for part in suite.slices)
    return replace(suite, items_needed=0, slices=slices)


def _verdict(policy: GatePolicy, suites: Sequence[SuiteJudgment]) -> Verdict:
    if all(_passes(policy, suite) for suite in suites):
        return Verdict.PASSED
    if any(_needs_retuning(policy, suite) for suite in suites):
        return Verdict.NEEDS_RETUNING
    if all(
        suite.versus_bare_base is not None and suite.versus_bare_base.reference_non_inferior
        for suite in suites
    ):
        return Verdict.RETIRE
    return Verdict.INCONCLUSIVE


def _passes(policy: GatePolicy, suite: SuiteJudgment) -> bool:
    bare, fresh = suite.versus_bare_base, suite.versus_fresh_adapter
    return (
        suite.versus_old_base.non_inferior
        and _has_few_flips(policy, suite)
        and all(part.versus_old_base.non_inferior for part in suite.required_slices)
        and (not policy.must_beat_bare or (bare is not None and bare.superior))
        and (not policy.must_match_fresh or (fresh is not None and fresh.non_inferior))
    )


def _needs_retuning(policy: GatePolicy, suite: SuiteJudgment) -> bool:
    fresh, flips = suite.versus_fresh_adapter, suite.negative_flips
    if flips is not None and flips.above_limit:
        return True
    if any(part.versus_old_base.inferior for part in suite.required_slices):
        return True
    return suite.versus_old_base.inferior or (
        policy.must_match_fresh and fresh is not None and fresh.inferior
    )


def _has_few_flips(policy: GatePolicy, suite: SuiteJudgment) -> bool:
    flips = suite.negative_flips
    return policy.max_negative_flip_points is None or (flips is not None and flips.below_limit)
