"""Apply the recovery strategies of a policy on one new base until a candidate passes the gate.

Each strategy is another chance to pass, so each is tested at its share of the policy's alpha. The
probability that a candidate passes whose loss exceeds the margin therefore stays at alpha.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import Evaluation, GatePolicy, Judgment, Verdict
from trans_peft.domain.outcome import Effect
from trans_peft.domain.recovery import RecoveryStrategy, StrategyAttempt
from trans_peft.errors import AdapterError, replacing_paths_in_errors
from trans_peft.lifecycle.base_files import base_folder
from trans_peft.lifecycle.engines import Engines, choose_engines
from trans_peft.lifecycle.evaluation import (
    BARE_BASE,
    EvaluationSubject,
    evaluate_on,
)
from trans_peft.lifecycle.leakage import with_leakage
from trans_peft.lifecycle.progress import ProgressCallback
from trans_peft.lifecycle.recovery.candidates import Candidate, CandidateInputs
from trans_peft.lifecycle.recovery.readiness import why_not_compensated, why_not_distilled
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
    recovery = policy.recovery
    compensation, distillation = recovery.compensation, recovery.distillation
    if compensation is not None and why_not_compensated(source, compensation):
        recovery = replace(recovery, compensation=None)
    if distillation is not None and why_not_distilled(source, distillation):
        recovery = replace(recovery, distillation=None)
    return replace(policy, recovery=recovery).per_strategy


@dataclass(frozen=True)
class CandidateEvaluator:
    """Evaluates candidates for one base version and applies the gate to each of them.

    Attributes:
        source: The adapter version that is transferred.
        folder: Returns the PEFT folder of `source`.
        trained_on: The base version that `source` was trained on.
        base: The new base version.
        policy: The gate policy at the level of one strategy (`policy_per_strategy`).
        platform: The platform.
        fresh: The version of the adapter that was trained on `base`, if there is one.
        on_progress: Called after each batch of items.
    """

    source: AdapterVersion
    folder: Callable[[], Path]
    trained_on: BaseVersion
    base: BaseVersion
    policy: GatePolicy
    platform: Platform
    fresh: AdapterVersion | None = None
    on_progress: ProgressCallback | None = None
    _references: dict[Engines, dict[str, Evaluation]] = field(default_factory=dict, init=False)

    def reference(self) -> Mapping[str, Evaluation]:
        """Return the evaluations of `source` on the base that it was trained on, by suite name.

        The engines are those that direct transfer has.
        """
        source = self.source
        direct = Candidate(RecoveryStrategy.DIRECT, self.folder, source.weights_sha256)
        with self._fresh() as fresh:
            return self._reference(self._engines(direct, fresh))

    def judge(self, candidate: Candidate) -> tuple[Judgment, tuple[Evaluation, ...]]:
        """Return the verdict on a candidate, and all evaluations behind it."""
        policy, suites, platform = self.policy, self.source.suites, self.platform
        with self._fresh() as fresh:
            engines = self._engines(candidate, fresh)
            reference = self._reference(engines)
            subject = EvaluationSubject(
                self.source.adapter,
                candidate.weights_sha256,
                candidate.folder,
                reference,
                engines,
            )
            of_fresh: Mapping[str, Evaluation] = {}
            if policy.sequential:
                found, bare = evaluate_sequentially(
                    policy, self.base, suites, platform, subject, on_progress=self.on_progress
                )
            else:
                found = self._evaluations(self.base, subject)
                bare = self._evaluations(self.base, replace(BARE_BASE, engines=engines))
                if fresh is not None:
                    of_fresh = self._evaluations(self.base, replace(fresh, engines=engines))
        judgment = engines.noted_in(judge(policy, reference, found, bare, of_fresh))
        judgment = with_leakage(judgment, policy, self.source)
        sides = (reference, found, bare, of_fresh)
        return judgment, tuple(evaluation for side in sides for evaluation in side.values())

    def _engines(self, candidate: Candidate, fresh: EvaluationSubject | None) -> Engines:
        """Return the engines that can answer all sides of the comparison with a candidate."""
        adapters = [(self.trained_on, self.folder), (self.base, candidate.folder)]
        if fresh is not None and fresh.folder is not None:
            adapters.append((self.base, fresh.folder))
        return choose_engines(self.policy.engine, self.source.suites, adapters, self.platform)

    def _reference(self, engines: Engines) -> Mapping[str, Evaluation]:
        if engines not in self._references:
            source = self.source
            subject = EvaluationSubject(
                source.adapter, source.weights_sha256, self.folder, engines=engines
            )
            self._references[engines] = self._evaluations(self.trained_on, subject)
        return self._references[engines]

    def _evaluations(self, base: BaseVersion, subject: EvaluationSubject) -> dict[str, Evaluation]:
        return evaluate_on(
            base, self.source.suites, self.platform, subject, on_progress=self.on_progress
        )

    @contextmanager
    def _fresh(self) -> Iterator[EvaluationSubject | None]:
        """Yield the version that was trained on the new base; None if it is not compared."""
        fresh = self.fresh
        if fresh is None or self.policy.sequential:
            yield None
            return
        with (
            tempfile.TemporaryDirectory(prefix="trans-peft-") as scratch,
            replacing_paths_in_errors({Path(scratch) / "fresh": str(fresh)}),
        ):
            folder = Path(scratch) / "fresh"
            download = cache(lambda: self.platform.registry.download(fresh, folder))
            yield EvaluationSubject(fresh.adapter, fresh.weights_sha256, download)


@dataclass(frozen=True)
class RecoveryResult:
    """The candidate to register, with its verdict.

    Attributes:
        candidate: The first candidate that passed, or else the first whose verdict is
            `inconclusive`, or else that of direct transfer.
        judgment: The verdict on the candidate.
        evaluations: All evaluations behind the verdict.
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

    Stops early at the verdict `retire` on a candidate that kept its score: the bare base is as good
    as the adapter was.
    """
    strategies = inputs.recovery.strategies
    required = evaluator.policy.requires(inputs.reference)
    tried: list[StrategyAttempt] = []
    best: tuple[Candidate, Judgment, tuple[Evaluation, ...]] | None = None
    is_open = True
    for strategy in strategies:
        started = time.monotonic()
        made = make_candidate(strategy, inputs)
        if isinstance(made, Candidate) and strategy is not RecoveryStrategy.DIRECT:
            made = _probed(made, evaluator)
        if isinstance(made, str):
            tried.append(StrategyAttempt(strategy, "", made, time.monotonic() - started))
            continue
        judgment, evaluations = evaluator.judge(made)
        verdict, seconds = judgment.verdict.value, time.monotonic() - started
        tried.append(StrategyAttempt(strategy, verdict, judgment.reason, seconds, made.note))
        if best is None or _is_better(judgment.verdict, best[1].verdict):
            best = made, judgment, evaluations
        is_open = _can_improve(judgment, required)
        if not is_open:
            break
        if strategy is not strategies[-1]:
            shown = inputs.reporter(f"{verdict} ({strategy})", "strategies")
            shown(len(tried), len(strategies))
    assert best is not None  # direct transfer is always tried
    return RecoveryResult(
        *best,
        tried=tuple(tried) if len(strategies) > 1 else (),
        is_open=is_open,
    )


def _can_improve(judgment: Judgment, required: Sequence[str]) -> bool:
    """Return whether another strategy may reach a better verdict.

    Beside an adapter that lost its score on the new base, every bare base looks good. So `retire`
    is final only for an adapter that kept its score on the required suites.
    """
    if judgment.verdict is Verdict.RETIRE:
        return not all(
            suite.versus_old_base.non_inferior
            for suite in judgment.suites
            if suite.suite in required
        )
    return judgment.verdict is not Verdict.PASSED


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
