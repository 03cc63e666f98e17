"""One adapter on one new base: from its bytes to a verdict in the registry."""

import tempfile
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

from trans_peft.domain.adapter import AdapterVersion, source_version
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import GatePolicy, Judgement, Verdict
from trans_peft.domain.outcome import Compatibility, TransferOutcome, TransferTask, outcome_of
from trans_peft.errors import naming, translating_full_disk_errors
from trans_peft.lifecycle.evaluations import (
    ProgressCallback,
    evaluate_on,
    named_fingerprint,
    tokenizer_folder,
)
from trans_peft.lifecycle.recovery.evaluator import CandidateEvaluator, probe, recover
from trans_peft.lifecycle.recovery.strategies import Candidate, recipe_on
from trans_peft.lifecycle.resolve import base_trained_on, find_base
from trans_peft.ports import Platform
from trans_peft.transfer.compatibility import compare, may_differ

__all__ = ["record_failure", "transfer"]


def transfer(
    work: TransferTask,
    family: str,
    policy: GatePolicy,
    platform: Platform,
    *,
    on_progress: ProgressCallback | None = None,
) -> TransferOutcome:
    """Judge one adapter on one new base; record the verdict and the version that has it.

    Compatibility (no weights on a device), transplant, effect probe, evaluation, gate against the
    results on the base that it was trained on. Whatever the registry knows already is taken from
    there: a changed policy is judged from stored results, without a model, as far as they go (a
    sequential policy stops asking once the verdict is known). Where direct transfer does not pass,
    the policy's remedies are tried in their order; the version is that of the first that passes, or
    else of direct transfer.
    """
    started = time.monotonic()
    base = find_base(family, work.base_version, platform)
    source = source_version(platform.registry.versions(work.adapter))
    with (
        translating_full_disk_errors(tempfile.gettempdir()),
        tempfile.TemporaryDirectory(prefix="trans-peft-") as scratch,
        naming({Path(scratch) / "source": str(source), Path(scratch): f"a copy of {source}"}),
    ):
        outcome = _judge(
            _new_outcome(source, base, policy, work.attempt),
            source,
            base,
            policy,
            platform,
            Path(scratch),
            on_progress,
        )
    outcome = replace(outcome, seconds=time.monotonic() - started)
    platform.registry.record(outcome)
    return outcome


def record_failure(
    work: TransferTask, family: str, policy: GatePolicy, platform: Platform, *, reason: str
) -> TransferOutcome:
    """Record that an attempt ended in an error; reconcile parks the key after three of them."""
    base = find_base(family, work.base_version, platform)
    source = source_version(platform.registry.versions(work.adapter))
    outcome = replace(
        _new_outcome(source, base, policy, work.attempt),
        judgement=Judgement(Verdict.FAILED, reason),
    )
    platform.registry.record(outcome)
    return outcome


def _new_outcome(
    source: AdapterVersion, base: BaseVersion, policy: GatePolicy, attempt: int
) -> TransferOutcome:
    return TransferOutcome(
        adapter=source.adapter,
        source_number=source.number,
        family=base.family,
        base_version=base.version,
        base_fingerprint_sha256=base.fingerprint_sha256,
        weights_sha256=source.weights_sha256,
        policy_sha256=policy.sha256,
        judgement=Judgement(Verdict.FAILED, "not judged"),
        attempts=attempt,
    )


def _judge(
    outcome: TransferOutcome,
    source: AdapterVersion,
    base: BaseVersion,
    policy: GatePolicy,
    platform: Platform,
    scratch: Path,
    on_progress: ProgressCallback | None,
) -> TransferOutcome:
    @cache  # fetched at most once, and not at all where every result is stored
    def folder() -> Path:
        return platform.registry.download(source, scratch / "source")

    trained_on = base_trained_on(source, platform)
    outcomes = platform.registry.outcomes(source.adapter)
    earlier = outcome_of(
        source.weights_sha256,
        base.fingerprint_sha256,
        (known for known in outcomes if known.new_number is not None),
    )
    if earlier is None:
        compatibility = _compare(folder(), trained_on, base, platform, scratch)
        effect = probe(folder(), base, source, platform) if compatibility.ok else None
    else:
        compatibility, effect = earlier.compatibility, earlier.effect
    outcome = replace(outcome, compatibility=compatibility, effect=effect)
    if not compatibility.ok:
        return _incompatible(outcome, "; ".join(compatibility.mismatches))
    if effect is None or not effect.found:
        return _incompatible(outcome, "the adapter changes no logit on this base")

    reference = evaluate_on(
        trained_on,
        source.suites,
        platform,
        adapter=folder,
        weights_sha256=source.weights_sha256,
        labels={"adapter": source.adapter},
        on_progress=on_progress,
    )
    bench = CandidateEvaluator(source, base, policy.per_strategy, reference, platform, on_progress)
    climbed = recover(bench, policy, folder, scratch)
    return replace(
        outcome,
        judgement=climbed.judgement,
        evaluations=(*reference.values(), *climbed.evaluations),
        new_number=_registered(source, base, climbed.candidate, platform, scratch),
        strategy=climbed.candidate.strategy,
        tried=climbed.tried,
        training=(
            recipe_on(source.recipe, base)
            if policy.recovery.retrain and climbed.open and source.recipe is not None
            else None
        ),
    )


def _compare(
    folder: Path, trained_on: BaseVersion, base: BaseVersion, platform: Platform, scratch: Path
) -> Compatibility:
    old, new = named_fingerprint(trained_on, platform), named_fingerprint(base, platform)
    same = not may_differ(old, new)
    return compare(
        old,
        new,
        folder,
        old_tokenizer=None if same else tokenizer_folder(trained_on, platform, scratch / "old"),
        new_tokenizer=None if same else tokenizer_folder(base, platform, scratch / "new"),
    )


def _registered(
    source: AdapterVersion,
    base: BaseVersion,
    made: Candidate,
    platform: Platform,
    scratch: Path,
) -> int:
    """Return the number of the version with these bytes on this base, registered once."""
    from trans_peft.transfer.load_adapter import transplant

    for version in platform.registry.versions(source.adapter):
        if (
            version.weights_sha256 == made.weights_sha256
            and version.base_fingerprint_sha256 == base.fingerprint_sha256
            and not version.state.superseded
        ):
            return version.number
    transplanted = transplant(
        made.folder(),
        scratch / "new-version",
        base_name=base.uri,
        base_revision=base.fingerprint_sha256,
    )
    draft = replace(
        source,
        base_version=base.version,
        base_fingerprint_sha256=base.fingerprint_sha256,
        weights_sha256=made.weights_sha256,
        transferred_from=source.number,
        made_by=made.strategy,
    )
    return platform.registry.register(draft, transplanted).number


def _incompatible(outcome: TransferOutcome, reason: str) -> TransferOutcome:
    return replace(outcome, judgement=Judgement(Verdict.INCOMPATIBLE, reason))
