"""Transfer one adapter to one new base version: evaluate, apply the gate, register the result."""

import tempfile
import threading
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import GatePolicy, Judgment, Verdict, suites_sha256
from trans_peft.domain.fleet import Fleet, RegisteredAdapter
from trans_peft.domain.outcome import Compatibility, TransferOutcome, TransferTask, outcome_of
from trans_peft.domain.recovery import RecoveryPolicy
from trans_peft.errors import (
    WorkerError,
    replacing_paths_in_errors,
    translating_full_disk_errors,
)
from trans_peft.lifecycle import kept_downloads
from trans_peft.lifecycle.base_files import (
    named_fingerprint,
    reading_base,
    tokenizer_folder,
)
from trans_peft.lifecycle.engines import check_engine
from trans_peft.lifecycle.fleet_claim import of_all_strategies
from trans_peft.lifecycle.leakage import leakage_problem
from trans_peft.lifecycle.progress import ProgressCallback
from trans_peft.lifecycle.recovery.candidates import Candidate, CandidateInputs, recipe_on
from trans_peft.lifecycle.recovery.evaluator import (
    CandidateEvaluator,
    policy_per_strategy,
    probe,
    recover,
)
from trans_peft.lifecycle.resolve import base_trained_on
from trans_peft.ports import Platform
from trans_peft.transfer.compatibility import compare, tokenizers_may_differ
from trans_peft.validation.statistics.pairing import check_flips, check_slices

__all__ = ["TransferInputs", "compatibility_on", "record_failure", "transfer"]

_computing = threading.Lock()
"""Held while a transfer uses models: the transfers of a process share one copy of a base."""


def transfer(
    task: TransferTask,
    fleet: Fleet,
    policy: GatePolicy,
    platform: Platform,
    *,
    on_progress: ProgressCallback | None = None,
) -> TransferOutcome:
    """Evaluate one adapter on one new base, apply the gate, and register the result.

    The steps are: compatibility (reads no weights), effect probe, evaluation on the new base, and
    the gate, which compares with the results on the base that the adapter was trained on. If direct
    transfer does not pass, the recovery strategies of the policy are tried in order. The registered
    version is that of the first strategy that passes, or else of the first one with the verdict
    `inconclusive`, or else of direct transfer.

    Stored results are reused. After a change of the policy no model is loaded, unless a sequential
    policy needs items that were not evaluated before.

    Several threads may transfer different adapters. One of them computes at a time; the others read
    and write the registry meanwhile. The seconds of the outcome do not include the wait for others.

    `fleet` comes from `observe_adapter` (or `observe`); the registry is not read again, except by
    the port methods that write. Raises NotFoundError if the adapter or the base is not in `fleet`.
    """
    inputs = TransferInputs.of(task, fleet)
    source = inputs.source
    with (
        translating_full_disk_errors(tempfile.gettempdir()),
        tempfile.TemporaryDirectory(prefix="trans-peft-") as scratch,
        replacing_paths_in_errors(
            {Path(scratch) / "source": str(source), Path(scratch): f"a copy of {source}"}
        ),
    ):
        with _computing:
            started = time.monotonic()
            outcome, candidate = _evaluate(
                _new_outcome(inputs, policy), inputs, policy, platform, Path(scratch), on_progress
            )
        if candidate is not None:
            number = _registered(inputs, candidate, platform, Path(scratch))
            outcome = replace(outcome, new_number=number)
    outcome = replace(outcome, seconds=time.monotonic() - started)
    platform.registry.record(outcome)
    return outcome


def record_failure(
    task: TransferTask, fleet: Fleet, policy: GatePolicy, platform: Platform, *, reason: str
) -> TransferOutcome:
    """Record that an attempt ended with an error. Reconcile parks a task after three failures."""
    outcome = replace(
        _new_outcome(TransferInputs.of(task, fleet), policy),
        judgment=Judgment(Verdict.FAILED, reason),
    )
    platform.registry.record(outcome)
    return outcome


@dataclass(frozen=True)
class TransferInputs:
    """What one transfer needs from the registry, taken from one read of the fleet."""

    task: TransferTask
    adapter: RegisteredAdapter
    base: BaseVersion
    bases: tuple[BaseVersion, ...]

    @classmethod
    def of(cls, task: TransferTask, fleet: Fleet) -> "TransferInputs":
        """Return the inputs.

        Raises NotFoundError if adapter or base is not in the fleet, and WorkerError if the code of
        this worker scores the suites in another way than the code that planned the task.
        """
        adapter = fleet.adapter(task.adapter)
        if task.suites_sha256 not in ("", found := suites_sha256(adapter.source.suites)):
            raise WorkerError(
                f"the code of this worker scores the suites of {task.adapter} in another way than "
                "the code of the reconcile that planned the transfer",
                expected=f"the hash {task.suites_sha256[:12]}",
                found=found[:12],
                do="update the checkout or image of the older one of the two workers",
            )
        return cls(task, adapter, fleet.referred_base(task.base), fleet.bases)

    @property
    def source(self) -> AdapterVersion:
        """The version that is transferred."""
        return self.adapter.source

    @property
    def trained_on(self) -> BaseVersion:
        """The base that it was trained on. Raises BaseUnreadableError."""
        with reading_base(self.source.trained_on):
            return base_trained_on(self.source, self.bases)

    def known_outcome(self) -> TransferOutcome | None:
        """Return the outcome of these weights on this base that made a version, if there is one."""
        return outcome_of(
            self.source.weights_sha256,
            self.base.fingerprint_sha256,
            (outcome for outcome in self.adapter.outcomes if outcome.new_number is not None),
        )


def _new_outcome(inputs: TransferInputs, policy: GatePolicy) -> TransferOutcome:
    source, base = inputs.source, inputs.base
    return TransferOutcome(
        adapter=source.adapter,
        source_number=source.number,
        base=base.ref,
        weights_sha256=source.weights_sha256,
        policy_sha256=policy.sha256,
        judgment=Judgment(Verdict.FAILED, "not evaluated"),
        attempts=inputs.task.attempt,
    )


def _evaluate(
    outcome: TransferOutcome,
    inputs: TransferInputs,
    policy: GatePolicy,
    platform: Platform,
    scratch: Path,
    on_progress: ProgressCallback | None,
) -> tuple[TransferOutcome, Candidate | None]:
    """Return the outcome without a version, and the candidate to register, if there is one."""
    check_engine(policy.engine, platform)  # before a model is loaded
    source, base, trained_on = inputs.source, inputs.base, inputs.trained_on

    @cache  # downloaded once, and only if something has to be computed
    def folder() -> Path:
        return kept_downloads.download(source, scratch / "source", platform)

    known = inputs.known_outcome()
    if known is None:
        compatibility = compatibility_on(folder(), trained_on, base, platform, scratch)
        effect = probe(folder(), base, source, platform) if compatibility.ok else None
    else:
        compatibility, effect = known.compatibility, known.effect
    outcome = replace(outcome, compatibility=compatibility, effect=effect)
    if not compatibility.ok:
        return _incompatible(outcome, "; ".join(compatibility.mismatches)), None
    if effect is None or not effect.found:
        return _incompatible(outcome, "the adapter changes no logit on this base"), None

    if leakage_problem(policy, source):
        # No strategy removes an item of the suite from the training rows.
        policy = replace(policy, recovery=RecoveryPolicy())
    evaluator = CandidateEvaluator(
        source,
        folder,
        trained_on,
        base,
        policy_per_strategy(policy, source),
        platform,
        fresh=inputs.adapter.trained_on(base),
        on_progress=on_progress,
    )
    reference = evaluator.reference()
    check_slices(policy, reference)
    check_flips(policy, reference)
    result = recover(
        evaluator,
        CandidateInputs(
            source,
            folder,
            base,
            trained_on,
            reference,
            policy.recovery,
            platform,
            scratch,
            on_progress,
        ),
    )
    judged = replace(
        outcome,
        judgment=of_all_strategies(result.judgment, policy),
        evaluations=result.evaluations,
        strategy=result.candidate.strategy,
        tried=result.tried,
        training=(
            recipe_on(source.recipe, base)
            if policy.recovery.retrain and result.is_open and source.recipe is not None
            else None
        ),
    )
    return judged, result.candidate


def compatibility_on(
    folder: Path, trained_on: BaseVersion, base: BaseVersion, platform: Platform, scratch: Path
) -> Compatibility:
    """Compare an adapter's two bases. No weights are read; `scratch` is a folder for tokenizers."""
    old, new = named_fingerprint(trained_on, platform), named_fingerprint(base, platform)
    same = not tokenizers_may_differ(old, new)
    return compare(
        old,
        new,
        folder,
        old_tokenizer=None if same else tokenizer_folder(trained_on, platform, scratch / "old"),
        new_tokenizer=None if same else tokenizer_folder(base, platform, scratch / "new"),
    )


def _registered(
    inputs: TransferInputs, candidate: Candidate, platform: Platform, scratch: Path
) -> int:
    """Register the candidate's weights on the new base and return the number of the version.

    Returns the number of the existing version if the same weights are registered on this base.
    """
    from trans_peft.transfer.load_adapter import rebind_adapter

    source, base = inputs.source, inputs.base
    for version in inputs.adapter.versions:
        if (
            version.weights_sha256 == candidate.weights_sha256
            and version.base.fingerprint_sha256 == base.fingerprint_sha256
            and not version.state.superseded
        ):
            return version.number
    rebound = rebind_adapter(
        candidate.folder(),
        scratch / "new-version",
        base_name=base.uri,
        base_revision=base.fingerprint_sha256,
    )
    draft = replace(
        source,
        base=base.ref,
        weights_sha256=candidate.weights_sha256,
        transferred_from=source.number,
        made_by=candidate.strategy,
    )
    return platform.registry.register(draft, rebound).number


def _incompatible(outcome: TransferOutcome, reason: str) -> TransferOutcome:
    return replace(outcome, judgment=Judgment(Verdict.INCOMPATIBLE, reason))
