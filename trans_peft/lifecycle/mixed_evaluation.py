"""Evaluate several adapters of one base in mixed batches, and store each evaluation by its key.

`evaluate_shard` does so for the transfers of a shard, before they run. Each transfer then finds its
evaluations in the store. An adapter that cannot share batches, or fails, has none there: its own
transfer evaluates it alone and reports its error. Only the default engine mixes adapters in a
batch. Another engine of the gate policy answers for one adapter after the other, so that a shard
also loads each base once.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import BARE, DEFAULT_ENGINE, Evaluation, GatePolicy, Suite
from trans_peft.domain.fleet import Fleet
from trans_peft.domain.outcome import TransferTask
from trans_peft.errors import EvaluationError, TransPeftError, translating_full_disk_errors
from trans_peft.lifecycle import kept_downloads
from trans_peft.lifecycle.base_files import base_folder
from trans_peft.lifecycle.engines import check_engine, choose_engines
from trans_peft.lifecycle.evaluation import (
    BARE_BASE,
    EvaluationSubject,
    evaluate_on,
    tokenized_suite_for,
)
from trans_peft.lifecycle.parallel import in_parallel
from trans_peft.lifecycle.progress import ProgressCallback, progress_reporter
from trans_peft.lifecycle.transfer import TransferInputs, compatibility_on
from trans_peft.ports import Platform
from trans_peft.text.saved_template import saved_template

if TYPE_CHECKING:
    from torch import nn

    from trans_peft.models import LoadedBase
    from trans_peft.validation.evaluate import AskedAdapter, MixedEvaluation

__all__ = ["evaluate_shard", "evaluate_together"]

Subjects = Sequence[tuple[EvaluationSubject, Sequence[Suite]]]


def evaluate_shard(
    transfers: Sequence[tuple[TransferTask, Fleet]],
    policy: GatePolicy,
    platform: Platform,
    *,
    size: int | None = None,
    on_progress: ProgressCallback | None = None,
) -> dict[str, str]:
    """Store the evaluations that transfers to one base need, from mixed batches where possible.

    Missing evaluations on the bases that the adapters were trained on come first, then those on the
    new base, with the bare base among the rows. The files and weights of at most `size` adapters
    are on this machine at once; None means all. Returns why adapters were left out, by name. A
    group that does not fit the memory is left out.

    Nothing is evaluated under a sequential policy, which needs few items of each adapter. Raises
    WorkerError if this worker lacks the policy's engine.
    """
    check_engine(policy.engine, platform)
    if policy.sequential:
        return {}
    from trans_peft.validation.decoding.batching import is_out_of_memory

    left_out: dict[str, str] = {}
    step = size or max(1, len(transfers))
    for at in range(0, len(transfers), step):
        part = transfers[at : at + step]
        try:
            left_out |= _evaluate_part(part, policy, platform, on_progress)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            left_out |= {task.adapter: f"out of memory: {error}" for task, _ in part}
    return left_out


def _evaluate_part(
    transfers: Sequence[tuple[TransferTask, Fleet]],
    policy: GatePolicy,
    platform: Platform,
    on_progress: ProgressCallback | None,
) -> dict[str, str]:
    left_out: dict[str, str] = {}
    with (
        translating_full_disk_errors(tempfile.gettempdir()),
        tempfile.TemporaryDirectory(prefix="trans-peft-") as scratch,
    ):
        ready: list[tuple[TransferInputs, BaseVersion, EvaluationSubject]] = []
        needed: list[TransferInputs] = []
        for task, fleet in transfers:
            try:
                needed.append(TransferInputs.of(task, fleet))
            except TransPeftError as error:
                left_out[task.adapter] = str(error)
        folders = {one.task.adapter: Path(scratch) / one.task.adapter / "adapter" for one in needed}
        downloads = _downloads(needed, folders, platform)
        for inputs in needed:
            task, source = inputs.task, inputs.source
            folder, download = folders[task.adapter].parent, downloads[task.adapter]
            try:
                old, known = inputs.trained_on, inputs.known_outcome()
                compatibility = (
                    compatibility_on(download(), old, inputs.base, platform, folder)
                    if known is None
                    else known.compatibility
                )
                if not compatibility.ok:
                    continue
                adapters = [(old, download), (inputs.base, download)]
                engines = choose_engines(policy.engine, source.suites, adapters, platform)
            except TransPeftError as error:
                left_out[task.adapter] = str(error)
                continue
            subject = EvaluationSubject(
                source.adapter, source.weights_sha256, download, engines=engines
            )
            ready.append((inputs, old, subject))
        for old in dict.fromkeys(old for _, old, _ in ready):
            asked: Subjects = [
                (subject, inputs.source.suites) for inputs, own, subject in ready if own == old
            ]
            left_out |= evaluate_together(old, asked, platform, on_progress=on_progress)
            left_out |= _evaluate_by_engine(old, asked, platform, on_progress)
        if ready:
            new = ready[0][0].base
            references = in_parallel(lambda one: _reference(one[0], one[1], platform), ready)
            asked = [
                (replace(subject, reference=reference), inputs.source.suites)
                for (inputs, _, subject), reference in zip(ready, references, strict=True)
            ]
            asked += [
                (replace(BARE_BASE, engines=subject.engines), suites) for subject, suites in asked
            ]
            left_out |= evaluate_together(new, asked, platform, on_progress=on_progress)
            left_out |= _evaluate_by_engine(new, asked, platform, on_progress)
        for inputs, _, _ in ready:
            if (folder := folders[inputs.task.adapter]).exists():
                kept_downloads.keep(inputs.source, folder)
    return left_out


def _downloads(
    needed: Sequence[TransferInputs], folders: Mapping[str, Path], platform: Platform
) -> dict[str, Callable[[], Path]]:
    """Return for each adapter a function that downloads its files once; download what is needed.

    A download that fails is repeated by the call of its function, which raises the error.
    """
    found: dict[str, Callable[[], Path]] = {
        one.task.adapter: cache(
            partial(kept_downloads.download, one.source, folders[one.task.adapter], platform)
        )
        for one in needed
    }

    def download(inputs: TransferInputs) -> None:
        if inputs.known_outcome() is None:
            with suppress(TransPeftError):
                found[inputs.task.adapter]()

    in_parallel(download, needed)
    return found


def _evaluate_by_engine(
    base: BaseVersion,
    subjects: Subjects,
    platform: Platform,
    on_progress: ProgressCallback | None,
) -> dict[str, str]:
    """Store the evaluations by engines other than the default; return why adapters have none."""
    left_out = {}
    for subject, suites in subjects:
        own = [suite for suite in suites if subject.engines.kind_for(suite) != DEFAULT_ENGINE]
        try:
            evaluate_on(base, own, platform, subject, on_progress=on_progress)
        except TransPeftError as error:
            left_out[subject.name] = str(error)
    return left_out


def evaluate_together(
    base: BaseVersion,
    subjects: Subjects,
    platform: Platform,
    *,
    on_progress: ProgressCallback | None = None,
) -> dict[str, str]:
    """Store the missing evaluations of several subjects on a base, from mixed batches.

    Evaluations share batches if their suites have the same decoding settings and the same common
    prefix of all prompts. Items with a near tie are asked again with their adapter alone. The keys
    are those of `evaluate_on`, and in float32 the answers are too. Suites that another engine than
    the default answers are left to `evaluate_on`.

    Returns why subjects were left out, by name. A subject is also left out, without a reason, if no
    other could share its batches. Raises what loading the base raises.
    """
    missing = {
        suite.evaluation_key(subject.weights_sha256, base.fingerprint_sha256): (subject, suite)
        for subject, suites in subjects
        for suite in suites
        if suite.judge is None  # a judge model is loaded after each adapter's answers
        and subject.engines.kind_for(suite) == DEFAULT_ENGINE
    }
    stored = in_parallel(platform.evaluations.get, [*missing])
    missing = {
        key: one for (key, one), found in zip(missing.items(), stored, strict=True) if found is None
    }
    left_out: dict[str, str] = {}
    for dtype in dict.fromkeys(suite.dtype for _, suite in missing.values()):
        asked = [(subject, suite) for subject, suite in missing.values() if suite.dtype == dtype]
        if len(asked) > 1:
            left_out |= _Group(base, platform, on_progress).evaluate(asked)
    return left_out


@dataclass(frozen=True)
class _Group:
    """Evaluations on one base in one dtype."""

    base: BaseVersion
    platform: Platform
    on_progress: ProgressCallback | None

    def evaluate(self, missing: Sequence[tuple[EvaluationSubject, Suite]]) -> dict[str, str]:
        from trans_peft.models import load_base
        from trans_peft.transfer.load_adapter import attached
        from trans_peft.transfer.mixed_adapters import attached_together
        from trans_peft.validation.decoding.cache_support import cache_support
        from trans_peft.validation.evaluate import answer

        loaded = load_base(base_folder(self.base, self.platform), missing[0][1].dtype)
        if not cache_support(loaded.model).batched:
            return {}  # its texts cannot share a pass
        asked, left_out = self._tokenized(loaded, missing)
        named = {subject.weights_sha256: subject for subject, _ in missing}
        folders = {
            one.adapter: folder()
            for one in asked
            if one.adapter is not None and (folder := named[one.adapter].folder) is not None
        }
        undecided: list[tuple[AskedAdapter, MixedEvaluation]] = []
        with attached_together(loaded.model, folders) as mixed:
            for adapter, reason in mixed.left_out.items():
                left_out[named[adapter].name] = reason
            shared = [one for one in asked if one.adapter is None or one.adapter in mixed.adapters]
            for group in _groups(loaded.model, shared):
                answered = self._answered(mixed, group)
                undecided += [pair for pair in answered if pair[1].near_tie_ids]
                in_parallel(
                    lambda pair: self._put(pair[1].evaluation, named[pair[0].weights_sha256]),
                    [pair for pair in answered if not pair[1].near_tie_ids],
                )
        for one, (evaluation, near_tie_ids) in undecided:
            subject = named[one.weights_sha256]
            attaching = (
                nullcontext(loaded.model)
                if one.adapter is None
                else attached(loaded.model, folders[one.adapter])
            )
            try:
                with attaching as alone:
                    again = answer(
                        alone,
                        one.questions.only(near_tie_ids),
                        weights_sha256=one.weights_sha256,
                        base_fingerprint_sha256=self.base.fingerprint_sha256,
                        drafts=one.drafts,
                    )
            except EvaluationError as error:
                left_out[subject.name] = str(error)
            else:
                self._put(_with_items(evaluation, again), subject)
        return left_out

    def _put(self, evaluation: Evaluation, subject: EvaluationSubject) -> None:
        labels = self.base.ref.labels | subject.labels
        self.platform.evaluations.put(evaluation, labels=labels)

    def _tokenized(
        self, loaded: "LoadedBase", missing: Sequence[tuple[EvaluationSubject, Suite]]
    ) -> "tuple[list[AskedAdapter], dict[str, str]]":
        """Return the questions of each subject, and why some have none."""
        from trans_peft.validation.evaluate import AskedAdapter

        asked, left_out = [], {}
        for subject, suite in missing:
            try:
                template = None if subject.folder is None else saved_template(subject.folder())
                questions = tokenized_suite_for(suite, loaded, self.platform, template)
            except TransPeftError as error:
                left_out[subject.name] = str(error)
                continue
            adapter = None if subject.weights_sha256 == BARE else subject.weights_sha256
            drafts = subject.drafts(suite.name)
            asked.append(AskedAdapter(adapter, questions, subject.weights_sha256, drafts))
        return asked, left_out

    def _answered(
        self, mixed: "nn.Module", asked: "Sequence[AskedAdapter]"
    ) -> "list[tuple[AskedAdapter, MixedEvaluation]]":
        """Return the evaluations. If one of them fails, the halves are tried by themselves."""
        from trans_peft.validation.evaluate import answer_together

        suites = sorted({one.questions.suite.name for one in asked})
        what = f"{len(asked)} evaluations together: {', '.join(suites)} on {self.base.version}"
        try:
            found = answer_together(
                mixed,
                asked,
                base_fingerprint_sha256=self.base.fingerprint_sha256,
                on_progress=progress_reporter(self.on_progress, what),
            )
            return [*zip(asked, found, strict=True)]
        except EvaluationError:
            if len(asked) == 1:
                return []
            half = len(asked) // 2
            return self._answered(mixed, asked[:half]) + self._answered(mixed, asked[half:])


def _groups(model: "nn.Module", asked: "Sequence[AskedAdapter]") -> "list[list[AskedAdapter]]":
    """Return the evaluations that share batches. One that could only run alone is left out."""
    from trans_peft.validation.decoding.prefixes import shared_prefix

    groups: dict[object, list[AskedAdapter]] = {}
    for one in asked:
        prefix = tuple(shared_prefix(model, one.questions.prompts))
        groups.setdefault((one.decoding, prefix), []).append(one)
    return [group for group in groups.values() if len(group) > 1]


def _with_items(evaluation: Evaluation, again: Evaluation) -> Evaluation:
    """Return an evaluation with the items of another one in place of its own."""
    items = {item.id: item for item in again.items}
    return replace(
        evaluation,
        items=tuple(items.get(item.id, item) for item in evaluation.items),
        seconds=evaluation.seconds + again.seconds,
    )


def _reference(
    inputs: TransferInputs, old: BaseVersion, platform: Platform
) -> Mapping[str, Evaluation]:
    """Return the stored evaluations of an adapter on the base that it was trained on, by suite."""
    source, fingerprint = inputs.source, old.fingerprint_sha256
    found = {
        suite.name: platform.evaluations.get(
            suite.evaluation_key(source.weights_sha256, fingerprint)
        )
        for suite in source.suites
    }
    return {name: evaluation for name, evaluation in found.items() if evaluation is not None}
