"""Apply the recovery strategies of a policy on one new base until a candidate passes the gate.

Each strategy is another chance to pass, so each is tested at its share of the policy's alpha. The
probability that a candidate passes whose loss exceeds the margin therefore stays at alpha.
"""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import Evaluation, GatePolicy, Judgment, Verdict
from trans_peft.domain.outcome import Effect
from trans_peft.domain.recovery import RecoveryStrategy, StrategyAttempt
from trans_peft.errors import AdapterError, replacing_paths_in_errors
from trans_peft.lifecycle.base_files import base_folder
from trans_peft.lifecycle.evaluation import (
    BARE_BASE,
    EvaluationSubject,
    evaluate_on,
)
from trans_peft.lifecycle.leakage import with_leakage
from trans_peft.lifecycle.progress import ProgressCallback
from trans_peft.lifecycle.recovery.candidates import Candidate, CandidateInputs
from trans_peft.lifecycle.recovery.prompts import has_prompts
from trans_peft.lifecycle.recovery.strategies import make_candidate
from trans_peft.lifecycle.sequential import evaluate_sequentially
from trans_peft.ports import Platform
from trans_peft.validation.gate import judge

__all__ = ["CandidateEvaluator", "RecoveryResult", "policy_per_strategy", "probe", "recover"]


def policy_per_strategy(policy: GatePolicy, source: AdapterVersion) -> GatePolicy:
    """Return the policy at the level of one recovery strategy of an adapter.

    The strategies that can be tried share alpha. `compensated` and `distilled` have no share if
    nothing names prompts for the adapter, and `compensated` has none for types that it does not
    support. This is known before anything is evaluated, so the level holds.
    """
    from trans_peft.transfer.low_rank_matrices import COMPENSABLE

    recovery = policy.recovery
    compensation, distillation = recovery.compensation, recovery.distillation
    if compensation is not None and not (
        source.method in COMPENSABLE and has_prompts(source, compensation)
    ):
        recovery = replace(recovery, compensation=None)
    if distillation is not None and not (source.recipe and has_prompts(source, distillation)):
        recovery = replace(recovery, distillation=None)
    return replace(policy, recovery=recovery).per_strategy


@dataclass(frozen=True)
class CandidateEvaluator:
    """Evaluates candidates for one base version and applies the gate to each of them.

    Attributes:
        source: The adapter version that is transferred.
        base: The new base version.
        policy: The gate policy at the level of one strategy (`policy_per_strategy`).
        reference: The evaluations of `source` on the base that it was trained on, by suite name.
        platform: The platform.
        fresh: The version of the adapter that was trained on `base`, if there is one.
        on_progress: Called after each batch of items.
    """

    source: AdapterVersion
    base: BaseVersion
    policy: GatePolicy
    reference: Mapping[str, Evaluation]
    platform: Platform
    fresh: AdapterVersion | None = None
    on_progress: ProgressCallback | None = None

    def judge(self, candidate: Candidate) -> tuple[Judgment, tuple[Evaluation, ...]]:
        """Return the verdict on a candidate, and the evaluations on the new base behind it."""
        subject = EvaluationSubject(
            self.source.adapter, candidate.weights_sha256, candidate.folder, self.reference
        )
        fresh: Mapping[str, Evaluation] = {}
        if self.policy.sequential:
            found, bare = evaluate_sequentially(
                self.policy,
                self.base,
                self.source.suites,
                self.platform,
                subject,
                on_progress=self.on_progress,
            )
        else:
            found, bare = self._evaluations(subject), self._evaluations(BARE_BASE)
            fresh = self._fresh_evaluations()
        judgment = judge(self.policy, self.reference, found, bare, fresh)
        judgment = with_leakage(judgment, self.policy, self.source)
        return judgment, (*found.values(), *bare.values(), *fresh.values())

    def _evaluations(self, subject: EvaluationSubject) -> dict[str, Evaluation]:
        return evaluate_on(
            self.base, self.source.suites, self.platform, subject, on_progress=self.on_progress
        )

    def _fresh_evaluations(self) -> dict[str, Evaluation]:
        """Return the evaluations of the adapter version that was trained on the new base."""
        fresh = self.fresh
        if fresh is None:
            return {}
        with (
            tempfile.TemporaryDirectory(prefix="trans-peft-") as scratch,
            replacing_paths_in_errors({Path(scratch) / "fresh": str(fresh)}),
        ):
            folder = Path(scratch) / "fresh"
            return self._evaluations(
                EvaluationSubject(
                    fresh.adapter,
                    fresh.weights_sha256,
                    cache(lambda: self.platform.registry.download(fresh, folder)),
                )
            )


@dataclass(frozen=True)
class RecoveryResult:
    """The candidate to register, with its verdict.

    Attributes:
        candidate: The first candidate that passed, or else the first whose verdict is
            `inconclusive`, or else that of direct transfer.
        judgment: The verdict on the candidate.
        evaluations: The evaluations on the new base behind the verdict.
        tried: One attempt per strategy; empty if the policy has no strategy but direct transfer.
        is_open: Whether the last candidate failed in a way that another strategy may correct.
    """

    candidate: Candidate
    judgment: Judgment
    evaluations: tuple[Evaluation, ...]
    tried: tuple[StrategyAttempt, ...]
    is_open: bool


def recover(evaluator: CandidateEvaluator, inputs: CandidateInputs) -> RecoveryResult:
    """Try the strategies of a policy in order, until a candidate passes.

    Stops early at the verdict `retire`: the bare base is as good as the adapter.
    """
    strategies = inputs.recovery.strategies
    tried: list[StrategyAttempt] = []
    best: tuple[Candidate, Judgment, tuple[Evaluation, ...]] | None = None
    verdict = ""
    for strategy in strategies:
        started = time.monotonic()
        made = make_candidate(strategy, inputs)
        if isinstance(made, Candidate) and strategy is not RecoveryStrategy.DIRECT:
            made = _probed(made, evaluator)
        if isinstance(made, str):
            tried.append(StrategyAttempt(strategy, "", made, time.monotonic() - started))
            continue
        judgment, evaluations = evaluator.judge(made)
        verdict = judgment.verdict.value
        seconds = time.monotonic() - started
        tried.append(StrategyAttempt(strategy, verdict, judgment.reason, seconds, made.note))
        if best is None or _is_better(judgment.verdict, best[1].verdict):
            best = made, judgment, evaluations
        if verdict in (Verdict.PASSED, Verdict.RETIRE):
            break
    assert best is not None  # direct transfer is always tried
    return RecoveryResult(
        *best,
        tried=tuple(tried) if len(strategies) > 1 else (),
        is_open=verdict not in (Verdict.PASSED, Verdict.RETIRE),
    )


def _probed(candidate: Candidate, evaluator: CandidateEvaluator) -> Candidate | str:
    """Return the candidate, or why it cannot be evaluated on the new base."""
    folder = candidate.folder()
    try:
        effect = probe(folder, evaluator.base, evaluator.source, evaluator.platform)
    except AdapterError as error:
        return f"its result cannot be used: {error}".replace(str(folder), str(evaluator.source))
    return candidate if effect.found else "it changes no logit on this base"


def _is_better(verdict: Verdict, other: Verdict) -> bool:
    order = (Verdict.INCONCLUSIVE, Verdict.PASSED)
    return verdict in order and (other not in order or order.index(verdict) > order.index(other))


def probe(folder: Path, base: BaseVersion, source: AdapterVersion, platform: Platform) -> Effect:
    """Return the result of the effect probe for the adapter in `folder` on a base."""
    from trans_peft.models import load_base
    from trans_peft.transfer.effect import probe_effect
    from trans_peft.transfer.load_adapter import attached

    loaded = load_base(base_folder(base, platform), source.suites[0].dtype)
    with attached(loaded.model, folder) as model:
        return probe_effect(model, loaded.tokenizer)
