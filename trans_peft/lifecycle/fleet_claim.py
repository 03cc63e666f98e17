"""The adapters that pass on a base within the false discovery rate of the promotion policy."""

from collections.abc import Mapping
from dataclasses import replace

from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import GatePolicy, Judgment, Verdict
from trans_peft.domain.fleet import Fleet
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.errors import InvalidSpecError
from trans_peft.validation.statistics.e_values import e_bh

__all__ = ["check_fdr", "of_all_strategies", "within_fdr"]


def check_fdr(policy: GatePolicy, promotion: PromotionPolicy) -> None:
    """Raise InvalidSpecError if the promotion policy has an FDR target without e-values."""
    if promotion.fdr is not None and not policy.sequential:
        raise InvalidSpecError(
            "the promotion policy has an FDR target, but the gate policy gives no e-values",
            expected="sequential: true in the gate policy",
            found=f"fdr={promotion.fdr}, sequential: false",
            do="set `sequential: true` in the gate policy, or remove `fdr` from the promotion "
            "policy",
        )


def of_all_strategies(judgment: Judgment, policy: GatePolicy) -> Judgment:
    """Return a judgment whose e-value is that of the adapter instead of one recovery strategy's.

    The hypothesis of the adapter is that the selected candidate is inferior. The sum of the
    strategies' e-values, each weighted with its share of alpha, has a mean of at most 1, and is at
    least the weighted e-value of the candidate. This includes `retrained`: the weights of its
    candidate do not depend on results of the suite's items, and whether it is trained at all can
    only take evidence away.
    """
    if judgment.e_value is None or judgment.alpha is None:
        return judgment
    return replace(judgment, e_value=judgment.e_value * judgment.alpha / policy.alpha)


def within_fdr(fleet: Fleet, fdr: float) -> Mapping[str, frozenset[str]]:
    """Return the names of the adapters that e-BH selects on each base, by the base's alias.

    Every live adapter that was not trained on the base is a hypothesis, whether it has a verdict or
    not. A version that the recovery strategy `retrained` made is one with the e-value of that
    strategy. An adapter that was judged on the base stays a hypothesis if it is trained there
    afterwards: otherwise the number of hypotheses would depend on the results. Its trained version
    is not selected and serves as every version that was trained on its base. Only `passed` with an
    e-value counts, so the set grows while verdicts are recorded.
    """
    return {base.alias: _selected(fleet, base, fdr) for base in fleet.bases}


def _selected(fleet: Fleet, base: BaseVersion, fdr: float) -> frozenset[str]:
    e_values: dict[str, float] = {}
    hypotheses = len(fleet.unreadable)
    for adapter in fleet.adapters:
        is_retrained = adapter.retrained_on(base) is not None
        is_claimed = is_retrained or adapter.trained_on(base) is None
        hypotheses += is_claimed or adapter.was_judged_on(base)
        if not is_claimed:
            continue
        outcome = adapter.deciding_outcome_on(base)
        if outcome is not None and outcome.verdict is Verdict.PASSED:
            e_values[adapter.name] = outcome.judgment.e_value or 0.0
    return e_bh(e_values, hypotheses, fdr)
