"""One adapter on one new base: from its bytes to a verdict in the registry."""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from trans_peft.domain.adapter import AdapterVersion, source_version
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import BARE, Evaluation, GatePolicy, Judgement, Verdict
from trans_peft.domain.outcome import Compatibility, Effect, TransferOutcome, Work
from trans_peft.errors import NotFoundError
from trans_peft.lifecycle.early import evaluate_early
from trans_peft.lifecycle.evaluations import Progress, base_folder, evaluate_on, tokenizer_folder
from trans_peft.lifecycle.resolve import find_base
from trans_peft.ports import Platform
from trans_peft.transfer.compatibility import compare
from trans_peft.validation.gate import judge

__all__ = ["record_failure", "transfer"]


def transfer(
    work: Work,
    family: str,
    policy: GatePolicy,
    platform: Platform,
    *,
    on_progress: Progress | None = None,
) -> TransferOutcome:
    """Judge one adapter on one new base; record the verdict and the version that has it.

    Compatibility (no weights on a device), transplant, effect probe, evaluation, gate against the
    results on the base that it was trained on. Whatever the registry knows already is taken from
    there: a changed policy is judged from stored results, without a model, as far as they go (a
    sequential policy stops asking once the verdict is known).
    """
    started = time.monotonic()
    base = find_base(family, work.base_version, platform)
    source = source_version(platform.registry.versions(work.adapter))
    with tempfile.TemporaryDirectory(prefix="trans-peft-") as scratch:
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
    work: Work, family: str, policy: GatePolicy, platform: Platform, *, reason: str
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
    on_progress: Progress | None,
) -> TransferOutcome:
    @cache  # fetched at most once, and not at all where every result is stored
    def folder() -> Path:
        return platform.registry.download(source, scratch / "source")

    trained_on = _trained_on(source, platform)
    earlier = _earlier(outcome, platform)
    if earlier is None:
        compatibility = _compare(folder(), trained_on, base, platform, scratch)
        effect = _probe(folder(), base, source, platform) if compatibility.ok else None
    else:
        compatibility, effect = earlier.compatibility, earlier.effect
    outcome = replace(outcome, compatibility=compatibility, effect=effect)
    if not compatibility.ok:
        return _incompatible(outcome, "; ".join(compatibility.mismatches))
    if effect is None or not effect.found:
        return _incompatible(outcome, "the adapter changes no logit on this base")

    def answers(
        on: BaseVersion,
        adapter: Callable[[], Path] | None,
        elsewhere: Mapping[str, Evaluation] | None = None,
    ) -> dict[str, Evaluation]:
        return evaluate_on(
            on,
            source.suites,
            platform,
            adapter=adapter,
            weights_sha256=source.weights_sha256 if adapter else BARE,
            elsewhere=elsewhere,
            labels={"adapter": source.adapter} if adapter else {},
            on_progress=on_progress,
        )

    reference = answers(trained_on, folder)
    if policy.sequential:
        candidate, bare = evaluate_early(
            policy,
            base,
            source.suites,
            reference,
            platform,
            adapter=folder,
            weights_sha256=source.weights_sha256,
            labels={"adapter": source.adapter},
            on_progress=on_progress,
        )
    else:
        candidate = answers(base, folder, elsewhere=reference)
        bare = answers(base, None)
    number = earlier.new_number if earlier else _register(source, base, folder(), platform, scratch)
    return replace(
        outcome,
        judgement=judge(policy, reference, candidate, bare),
        evaluations=(*reference.values(), *candidate.values(), *bare.values()),
        new_number=number,
    )


def _earlier(outcome: TransferOutcome, platform: Platform) -> TransferOutcome | None:
    return next(
        (
            earlier
            for earlier in platform.registry.outcomes(outcome.adapter)
            if earlier.base_fingerprint_sha256 == outcome.base_fingerprint_sha256
            and earlier.weights_sha256 == outcome.weights_sha256
            and earlier.new_number is not None
        ),
        None,
    )


def _compare(
    folder: Path, trained_on: BaseVersion, base: BaseVersion, platform: Platform, scratch: Path
) -> Compatibility:
    old, new = platform.catalog.fingerprint(trained_on), platform.catalog.fingerprint(base)
    same = old.tokenizer_sha256 == new.tokenizer_sha256
    return compare(
        old,
        new,
        folder,
        old_tokenizer=None if same else tokenizer_folder(trained_on, platform, scratch / "old"),
        new_tokenizer=None if same else tokenizer_folder(base, platform, scratch / "new"),
    )


def _probe(folder: Path, base: BaseVersion, source: AdapterVersion, platform: Platform) -> Effect:
    from trans_peft.models import load_base
    from trans_peft.transfer.effect import probe_effect
    from trans_peft.transfer.transplant import attached

    loaded = load_base(base_folder(base, platform), source.suites[0].dtype)
    with attached(loaded.model, folder) as model:
        return probe_effect(model, loaded.tokenizer)


def _register(
    source: AdapterVersion, base: BaseVersion, folder: Path, platform: Platform, scratch: Path
) -> int:
    from trans_peft.transfer.transplant import transplant

    transplanted = transplant(
        folder, scratch / "new-version", base_name=base.uri, base_revision=base.fingerprint_sha256
    )
    draft = replace(
        source,
        base_version=base.version,
        base_fingerprint_sha256=base.fingerprint_sha256,
        transferred_from=source.number,
    )
    return platform.registry.register(draft, transplanted).number


def _incompatible(outcome: TransferOutcome, reason: str) -> TransferOutcome:
    return replace(outcome, judgement=Judgement(Verdict.INCOMPATIBLE, reason))


def _trained_on(source: AdapterVersion, platform: Platform) -> BaseVersion:
    for base in platform.catalog.versions(source.family):
        if base.ready and base.fingerprint_sha256 == source.base_fingerprint_sha256:
            return base
    raise NotFoundError(
        f"{source} was trained on a base that is no longer in the catalog",
        expected=f"{source.family}/{source.trained_on_version} with fingerprint "
        f"{source.trained_on_fingerprint_sha256[:12]}",
        do="register that base version again: the gate compares with results on it",
    )
