"""The last recovery strategy: train by the adapter's recipe on the new base and apply the gate.

It runs as a flow of its own, because it takes as long as any training. Unlike `train`, it registers
nothing if the adapter does not pass: the version and the verdict of direct transfer remain.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

from trans_peft.data.training_rows import read_training_rows
from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.evaluation import (
    BARE,
    DEFAULT_ENGINE,
    Evaluation,
    GatePolicy,
    Verdict,
)
from trans_peft.domain.outcome import TransferOutcome
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.domain.recovery import RecoveryStrategy, StrategyAttempt
from trans_peft.errors import NotFoundError
from trans_peft.lifecycle.engines import check_engine
from trans_peft.lifecycle.fleet_claim import of_all_strategies
from trans_peft.lifecycle.progress import ProgressCallback
from trans_peft.lifecycle.recovery.candidates import Candidate
from trans_peft.lifecycle.recovery.evaluator import CandidateEvaluator, policy_per_strategy
from trans_peft.lifecycle.resolve import base_trained_on, find_base
from trans_peft.lifecycle.synthetic_prompts import keep_prompts
from trans_peft.lifecycle.train import (
    job_on,
    remove_checkpoints,
    resolve_recipe,
    stored_checkpoints,
    trained_version,
)
from trans_peft.ports import Platform
from trans_peft.training.checkpoint_store import continued
from trans_peft.training.events import Event
from trans_peft.training.launch import fit

__all__ = ["retrain"]


def retrain(
    recipe: TrainingRecipe,
    policy: GatePolicy,
    platform: Platform,
    *,
    on_event: Callable[[Event], None],
    on_progress: ProgressCallback | None = None,
) -> TransferOutcome:
    """Train on the recipe's base, compare with the adapter on its old base, record the outcome.

    `recipe` is the `training` of the outcome of a transfer. Raises NotFoundError before the
    training if the adapter has no outcome on that base, or if the base that the adapter was trained
    on is no longer in the catalog, and WorkerError if this worker lacks the policy's
    engine. If the training raises an error, nothing is recorded.
    """
    started = time.monotonic()
    check_engine(policy.engine, platform)
    base = find_base(recipe.family, recipe.base_version, platform)
    adapter = platform.registry.adapter(recipe.adapter)
    source, earlier = adapter.source, adapter.outcome_on(base)
    if earlier is None:
        raise NotFoundError(
            f"{source.adapter} has no verdict on {base}, so it cannot be retrained there",
            expected="the outcome of a transfer, which retraining replaces",
            do="reconcile the family first, or train the adapter with `train`",
        )
    trained_on = base_trained_on(source, platform.catalog.versions(source.base.family))
    resolved, _ = resolve_recipe(recipe, platform)
    job = job_on(base, resolved, read_training_rows(resolved, platform.store), platform)
    checkpoints = stored_checkpoints(job, platform)
    result = fit(job, on_event=continued(job, checkpoints, on_event))
    candidate = Candidate(RecoveryStrategy.RETRAINED, lambda: result.folder, result.weights_sha256)
    with tempfile.TemporaryDirectory(prefix="trans-peft-") as scratch:
        folder = cache(lambda: platform.registry.download(source, Path(scratch, "source")))
        if resolved.synthetic_prompts is not None:
            keep_prompts(folder(), result.folder)
        evaluator = CandidateEvaluator(
            source,
            folder,
            trained_on,
            base,
            policy_per_strategy(policy, source),
            platform,
            fresh=adapter.trained_on(base),
            on_progress=on_progress,
        )
        judgment, evaluations = evaluator.judge(candidate)
    tried = StrategyAttempt(
        RecoveryStrategy.RETRAINED,
        judgment.verdict.value,
        judgment.reason,
        time.monotonic() - started,
        f"{result.steps} steps, {result.seconds:.0f} s of training",
    )
    outcome = replace(
        earlier,
        tried=(*(t for t in earlier.tried if t.strategy is not RecoveryStrategy.RETRAINED), tried),
        training=None,
        policy_sha256=policy.sha256,
        evaluations=_stored(source, earlier, platform),
        seconds=earlier.seconds + tried.seconds,
    )
    if judgment.verdict is Verdict.PASSED:
        version = platform.registry.register(
            replace(
                trained_version(base, resolved, result),
                suites=source.suites,
                made_by=RecoveryStrategy.RETRAINED,
                leakage=source.leakage,  # of the same training rows and suites
            ),
            result.folder,
            tags=result.tags,
        )
        outcome = replace(
            outcome,
            judgment=of_all_strategies(judgment, policy),
            evaluations=evaluations,
            new_number=version.number,
            strategy=RecoveryStrategy.RETRAINED,
        )
    platform.registry.record(outcome)
    remove_checkpoints(checkpoints)
    return outcome


def _stored(
    source: AdapterVersion, earlier: TransferOutcome, platform: Platform
) -> tuple[Evaluation, ...]:
    """Return the stored evaluations behind the verdict of direct transfer, whole suites only."""
    engines = {figures.suite: figures.engine for figures in earlier.judgment.suites}
    new = earlier.base.fingerprint_sha256
    sides = (
        (source.weights_sha256, source.base.fingerprint_sha256),
        (source.weights_sha256, new),
        (BARE, new),
    )
    found = (
        platform.evaluations.get(
            suite.evaluation_key(*side, engines.get(suite.name, DEFAULT_ENGINE))
        )
        for side in sides
        for suite in source.suites
    )
    return tuple(evaluation for evaluation in found if evaluation is not None)
