"""One adapter on one new base: from its bytes to a verdict in the registry."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import BARE, GatePolicy, Judgement, Suite, Verdict
from trans_peft.domain.outcome import TransferOutcome
from trans_peft.errors import NotFoundError
from trans_peft.lifecycle.evaluations import Progress, base_folder, evaluate_on
from trans_peft.ports import Platform
from trans_peft.transfer.compatibility import compare
from trans_peft.validation.gate import judge

__all__ = ["record_failure", "source_version", "transfer"]


def source_version(versions: Sequence[AdapterVersion]) -> AdapterVersion:
    """Return the version whose bytes are carried to new bases: the latest that was trained.

    Raises NotFoundError where none was (every version is a transferred or a superseded one).
    """
    trained = [v for v in versions if v.is_trained and not v.state.superseded]
    if not trained:
        names = ", ".join(str(version) for version in versions) or "no version at all"
        raise NotFoundError(
            "the adapter has no trained version to carry over",
            expected="a version bound to the base it was trained on",
            found=names,
            do="train it, or adopt the PEFT folder it came from",
        )
    return max(trained, key=lambda version: version.number)


def transfer(
    adapter: str,
    base: BaseVersion,
    policy: GatePolicy,
    platform: Platform,
    *,
    attempt: int = 1,
    on_progress: Progress | None = None,
) -> TransferOutcome:
    """Judge an adapter on a new base and record the outcome: a verdict, and a version that has it.

    Compatibility (no weights on a device), transplant, effect probe, evaluation, gate against the
    results on the base that it was trained on. Everything known already (an evaluation, a version)
    is taken from the registry, so that a second run does no work twice.
    """
    started = time.monotonic()
    source = source_version(platform.registry.versions(adapter))
    trained_on = _base_of(source, platform)
    outcome = TransferOutcome(
        adapter=adapter,
        source_number=source.number,
        family=base.family,
        base_version=base.version,
        base_fingerprint_sha256=base.fingerprint_sha256,
        weights_sha256=source.weights_sha256,
        policy_sha256=policy.sha256,
        judgement=Judgement(Verdict.FAILED, "not judged yet"),
        attempts=attempt,
    )
    with tempfile.TemporaryDirectory(prefix="trans-peft-") as scratch:
        outcome = _judged(
            outcome, source, trained_on, base, policy, platform, Path(scratch), on_progress
        )
    outcome = replace(outcome, seconds=time.monotonic() - started)
    platform.registry.record(outcome)
    return outcome


def record_failure(
    adapter: str,
    base: BaseVersion,
    policy: GatePolicy,
    platform: Platform,
    *,
    error: BaseException,
    attempt: int,
) -> TransferOutcome:
    """Record that an attempt ended in an error; after three the key is parked for a person."""
    source = source_version(platform.registry.versions(adapter))
    outcome = TransferOutcome(
        adapter=adapter,
        source_number=source.number,
        family=base.family,
        base_version=base.version,
        base_fingerprint_sha256=base.fingerprint_sha256,
        weights_sha256=source.weights_sha256,
        policy_sha256=policy.sha256,
        judgement=Judgement(Verdict.FAILED, f"{type(error).__name__}: {error}"),
        attempts=attempt,
    )
    platform.registry.record(outcome)
    return outcome


def _judged(
    outcome: TransferOutcome,
    source: AdapterVersion,
    trained_on: BaseVersion,
    base: BaseVersion,
    policy: GatePolicy,
    platform: Platform,
    scratch: Path,
    on_progress: Progress | None,
) -> TransferOutcome:
    folder = platform.registry.download(source, scratch / "source")
    new_base = base_folder(base, platform)
    compatibility = compare(
        platform.catalog.fingerprint(trained_on),
        platform.catalog.fingerprint(base),
        folder,
        old_tokenizer=base_folder(trained_on, platform),
        new_tokenizer=new_base,
    )
    outcome = replace(outcome, compatibility=compatibility)
    if not compatibility.ok:
        return _incompatible(outcome, "; ".join(compatibility.mismatches))

    from trans_peft.transfer.transplant import transplant

    candidate_folder = transplant(
        folder,
        scratch / "candidate",
        base_name=base.uri,
        base_revision=base.fingerprint_sha256,
    )
    effect = _probe(new_base, candidate_folder, source.suites[0])
    outcome = replace(outcome, effect=effect)
    if not effect.found:
        return _incompatible(outcome, "the adapter changes no logit on this base")

    labels = {"adapter": outcome.adapter}
    reference = evaluate_on(
        trained_on,
        source.suites,
        platform,
        adapter_folder=folder,
        weights_sha256=source.weights_sha256,
        labels=labels,
        on_progress=on_progress,
    )
    candidate = evaluate_on(
        base,
        source.suites,
        platform,
        adapter_folder=candidate_folder,
        weights_sha256=source.weights_sha256,
        labels=labels,
        on_progress=on_progress,
    )
    bare = evaluate_on(
        base,
        source.suites,
        platform,
        adapter_folder=None,
        weights_sha256=BARE,
        on_progress=on_progress,
    )
    judgement = judge(policy, reference, candidate, bare)
    version = platform.registry.register(
        replace(
            source,
            base_version=base.version,
            base_fingerprint_sha256=base.fingerprint_sha256,
            transferred_from=source.number,
            run_id=None,
        ),
        candidate_folder,
    )
    return replace(
        outcome,
        judgement=judgement,
        evaluations=(*reference.values(), *candidate.values(), *bare.values()),
        new_number=version.number,
    )


def _incompatible(outcome: TransferOutcome, reason: str) -> TransferOutcome:
    return replace(outcome, judgement=Judgement(Verdict.INCOMPATIBLE, reason))


def _probe(new_base: Path, candidate_folder: Path, suite: Suite):
    from trans_peft.models import load_base
    from trans_peft.transfer.effect import probe_effect
    from trans_peft.transfer.transplant import attached

    loaded = load_base(new_base, suite.dtype)
    with attached(loaded.model, candidate_folder) as model:
        return probe_effect(model, loaded.tokenizer)


def _base_of(version: AdapterVersion, platform: Platform) -> BaseVersion:
    for base in platform.catalog.versions(version.family):
        if base.ready and base.fingerprint_sha256 == version.base_fingerprint_sha256:
            return base
    raise NotFoundError(
        f"{version} was trained on a base that is no longer in the catalog",
        expected=f"{version.family}/{version.trained_on_version} with fingerprint "
        f"{version.trained_on_fingerprint_sha256[:12]}",
        do="register that base version again: the gate compares with results on it",
    )
