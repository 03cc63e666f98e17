"""The ladder on one new base: candidates, judged by the same gate, up to the first that passes.

Every rung is one more chance to pass, so each is judged at its share of the policy's alpha: the
chance that anything passes that lost the margin stays at alpha, however many rungs there are.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import BARE, Evaluation, GatePolicy, Judgement, Verdict
from trans_peft.domain.outcome import Effect
from trans_peft.domain.recovery import RecoveryStrategy, StrategyAttempt
from trans_peft.errors import replacing_paths_in_errors
from trans_peft.lifecycle.evaluations import ProgressCallback, base_folder, evaluate_on
from trans_peft.lifecycle.recovery.strategies import Candidate, CandidateInputs, candidate
from trans_peft.lifecycle.sequential import evaluate_sequentially
from trans_peft.ports import Platform
from trans_peft.validation.gate import judge

__all__ = ["CandidateEvaluator", "RecoveryResult", "probe", "recover"]


@dataclass(frozen=True)
class CandidateEvaluator:
    """Where candidates for one base are judged, each in the same way."""

    source: AdapterVersion
    base: BaseVersion
    policy: GatePolicy
    reference: Mapping[str, Evaluation]
    platform: Platform
    fresh: AdapterVersion | None = None
    on_progress: ProgressCallback | None = None

    def judge(self, made: Candidate) -> tuple[Judgement, tuple[Evaluation, ...]]:
        """Return the verdict on a candidate, and what was answered on the new base for it."""
        if self.policy.sequential:
            candidate, bare = evaluate_sequentially(
                self.policy,
                self.base,
                self.source.suites,
                self.reference,
                self.platform,
                adapter=made.folder,
                weights_sha256=made.weights_sha256,
                labels={"adapter": self.source.adapter},
                on_progress=self.on_progress,
            )
            fresh: Mapping[str, Evaluation] = {}
        else:
            candidate = self._answers(made.folder, made.weights_sha256, self.reference)
            bare = self._answers(None, BARE)
            fresh = self._fresh()
        judgement = judge(self.policy, self.reference, candidate, bare, fresh)
        return judgement, (*candidate.values(), *bare.values(), *fresh.values())

    def _answers(
        self,
        adapter: Callable[[], Path] | None,
        weights_sha256: str,
        elsewhere: Mapping[str, Evaluation] | None = None,
    ) -> dict[str, Evaluation]:
        return evaluate_on(
            self.base,
            self.source.suites,
            self.platform,
            adapter=adapter,
            weights_sha256=weights_sha256,
            elsewhere=elsewhere,
            labels={"adapter": self.source.adapter} if adapter else {},
            on_progress=self.on_progress,
        )

    def _fresh(self) -> dict[str, Evaluation]:
        """Return what another version of the adapter answers that was trained on this base."""
        fresh = self.fresh
        if fresh is None:
            return {}
        with (
            tempfile.TemporaryDirectory(prefix="trans-peft-") as scratch,
            replacing_paths_in_errors({Path(scratch) / "fresh": str(fresh)}),
        ):
            return self._answers(
                lambda: self.platform.registry.download(fresh, Path(scratch) / "fresh"),
                fresh.weights_sha256,
            )


@dataclass(frozen=True)
class RecoveryResult:
    """How far the ladder was climbed; `open`: the last rung did not pass, more may help."""

    candidate: Candidate
    judgement: Judgement
    evaluations: tuple[Evaluation, ...]
    tried: tuple[StrategyAttempt, ...]
    open: bool


def recover(
    evaluator: CandidateEvaluator, policy: GatePolicy, folder: Callable[[], Path], scratch: Path
) -> RecoveryResult:
    """Try one rung after the other until one passes; without one, direct transfer stands.

    Where the bare base is shown to be as good as the adapter, there is nothing to remedy.
    """
    material = CandidateInputs(
        evaluator.source, folder, evaluator.base, policy.recovery, evaluator.platform, scratch
    )
    tried: list[StrategyAttempt] = []
    stands: tuple[Candidate, Judgement, tuple[Evaluation, ...]] | None = None
    verdict = ""
    for strategy in policy.recovery.strategies:
        started = time.monotonic()
        made = candidate(strategy, material)
        if not isinstance(made, str) and strategy is not RecoveryStrategy.DIRECT:
            effect = probe(made.folder(), evaluator.base, evaluator.source, evaluator.platform)
            made = made if effect.found else "it changes no logit on this base"
        if isinstance(made, str):
            tried.append(StrategyAttempt(strategy, "", made, time.monotonic() - started))
            continue
        judgement, evaluations = evaluator.judge(made)
        verdict = judgement.verdict.value
        seconds = time.monotonic() - started
        tried.append(StrategyAttempt(strategy, verdict, judgement.reason, seconds, made.note))
        if stands is None or judgement.verdict is Verdict.PASSED:
            stands = made, judgement, evaluations
        if verdict in (Verdict.PASSED, Verdict.RETIRE):
            break
    assert stands is not None  # direct transfer is always tried
    ladder = tuple(tried) if len(policy.recovery.strategies) > 1 else ()
    return RecoveryResult(*stands, ladder, open=verdict not in (Verdict.PASSED, Verdict.RETIRE))


def probe(folder: Path, base: BaseVersion, source: AdapterVersion, platform: Platform) -> Effect:
    """Return what the adapter in `folder` changes on the base: the effect probe."""
    from trans_peft.models import load_base
    from trans_peft.transfer.effect import probe_effect
    from trans_peft.transfer.load_adapter import attached

    loaded = load_base(base_folder(base, platform), source.suites[0].dtype)
    with attached(loaded.model, folder) as model:
        return probe_effect(model, loaded.tokenizer)
