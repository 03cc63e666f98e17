"""Evaluate adapters and bare bases on suites. Stored evaluations are reused."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from trans_peft.data import Example, pin, read_examples
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import BARE, Evaluation, Suite
from trans_peft.lifecycle.base_files import base_folder
from trans_peft.lifecycle.engines import ONLY_DEFAULT, Engines, opened
from trans_peft.lifecycle.harness_suites import with_harness_items
from trans_peft.lifecycle.judge_model import judged, labeled_marks, pin_judge
from trans_peft.lifecycle.progress import ProgressCallback, progress_reporter
from trans_peft.ports import Platform
from trans_peft.text.chat import template_of
from trans_peft.text.saved_template import saved_template

if TYPE_CHECKING:
    from trans_peft.models import LoadedBase
    from trans_peft.validation.tokenized_suite import TokenizedSuite

    _SuitesOfBase = OrderedDict[tuple[Suite, str | None], TokenizedSuite]

__all__ = [
    "BARE_BASE",
    "EvaluationSubject",
    "evaluate_on",
    "pin_suites",
    "tokenized_suite_for",
    "with_groups",
]

_MAX_SUITES_PER_BASE = 16
"""Tokenized suites that are kept for one base, the most recently used first. The limit keeps memory
constant in a fleet where every adapter has a suite of its own."""

_tokenized_suites: "WeakKeyDictionary[LoadedBase, _SuitesOfBase]" = WeakKeyDictionary()


@dataclass(frozen=True)
class EvaluationSubject:
    """What is evaluated on a base: an adapter, or the bare base (`BARE_BASE`).

    Attributes:
        name: The adapter's name, for progress reports and for the labels of stored evaluations.
        weights_sha256: The hash of the adapter's weights; part of the evaluation's key.
        folder: Returns the adapter's PEFT folder. It is called only if items must be evaluated.
            None for the bare base.
        reference: Evaluations of the same adapter on another base, by suite name. Decoding uses the
            answers that they keep as drafts.
        engines: The engine that answers each suite.
    """

    name: str
    weights_sha256: str
    folder: Callable[[], Path] | None
    reference: Mapping[str, Evaluation] = field(default_factory=dict)
    engines: Engines = ONLY_DEFAULT

    @property
    def labels(self) -> dict[str, str]:
        """The labels that a stored evaluation gets."""
        return {} if self.folder is None else {"adapter": self.name}

    def evaluation_key(self, suite: Suite, base: BaseVersion) -> str:
        """Return the key of its evaluation on a base."""
        return suite.evaluation_key(
            self.weights_sha256, base.fingerprint_sha256, self.engines.name_for(suite)
        )

    def evaluated_on(self, suite: Suite, base: BaseVersion) -> str:
        """Return the description of an evaluation in progress reports."""
        return f"{self.name}: {suite.name} on {base.version}"

    def drafts(self, suite: str) -> Mapping[str, str]:
        """Return the kept answers of the reference to a suite, by item id."""
        reference = self.reference.get(suite)
        return {} if reference is None else reference.kept_answers


BARE_BASE = EvaluationSubject("bare base", BARE, None)
"""The base version without an adapter."""


def pin_suites(
    suites: Sequence[Suite], platform: Platform, *, tasks_folder: str | None = None
) -> tuple[Suite, ...]:
    """Return the suites with the hash of the data that they name now.

    A suite that is pinned already keeps its hash. A judge model is pinned as well. The items of a
    task of lm-evaluation-harness are stored below `platform.suites_uri`; `tasks_folder` contains
    additional tasks of the harness (YAML), whose Python functions are run.
    """
    with_items = (
        with_harness_items(suite, platform, tasks_folder=tasks_folder) for suite in suites
    )
    return tuple(
        replace(
            suite,
            data=suite.data if suite.data.sha256 else pin(suite.data, platform.store),
            judge=suite.judge and pin_judge(suite.judge, platform),
        )
        for suite in with_items
    )


def tokenized_suite_for(
    suite: Suite, base: "LoadedBase", platform: Platform, template: str | None = None
) -> "TokenizedSuite":
    """Return a pinned suite as token ids of a base's tokenizer.

    Each suite is read, checked and tokenized once while the base stays in memory. `template` is the
    adapter's own chat template; None means the base's. Raises what `trans_peft.data.read_examples`
    and `trans_peft.validation.tokenized_suite.prepare` raise.
    """
    from trans_peft.validation.evaluate import context_of
    from trans_peft.validation.tokenized_suite import prepare

    kept = _tokenized_suites.setdefault(base, OrderedDict())
    template = template_of(base.tokenizer) if template is None else template
    key = (suite, template)
    if key not in kept:
        examples = read_examples(suite.data, platform.store, limit=suite.limit)
        kept[key] = prepare(
            base.tokenizer,
            suite,
            examples,
            context=context_of(base.model),
            template=template,
            may_lack=platform.may_lack,
        )
        while len(kept) > _MAX_SUITES_PER_BASE:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


def evaluate_on(
    base: BaseVersion,
    suites: Sequence[Suite],
    platform: Platform,
    subject: EvaluationSubject = BARE_BASE,
    *,
    on_progress: ProgressCallback | None = None,
) -> dict[str, Evaluation]:
    """Return one evaluation per suite name of a subject on a base.

    Evaluations with the same key in the evaluation store are returned from there. A model is loaded
    only if one is missing. Each new evaluation is stored as soon as it is complete.

    Example::

        subject = EvaluationSubject("chat", adapter_weights_sha256(folder), lambda: folder)
        evaluations = evaluate_on(base, pin_suites(suites, platform), platform, subject)
        print({suite: evaluation.score for suite, evaluation in evaluations.items()})
    """
    stored = {  # all reads come first: the store must respond before hours of evaluation
        suite.name: platform.evaluations.get(subject.evaluation_key(suite, base))
        for suite in suites
    }
    found: dict[str, Evaluation] = {}
    for suite in suites:
        evaluation = stored[suite.name]
        if evaluation is None:
            evaluation = _evaluate(base, suite, platform, subject, on_progress)
            labels = base.ref.labels | subject.labels
            platform.evaluations.put(evaluation, labels=labels)
        found[suite.name] = evaluation
    return found


def _evaluate(
    base: BaseVersion,
    suite: Suite,
    platform: Platform,
    subject: EvaluationSubject,
    on_progress: ProgressCallback | None,
) -> Evaluation:
    if suite.judge is None:
        return _answered(base, suite, platform, subject, on_progress)[0]
    labeled_marks(suite, platform, on_progress=on_progress)  # an unusable judge is an error first
    answered, examples = _answered(base, suite, platform, subject, on_progress)
    return judged(answered, examples, suite, platform, on_progress=on_progress)


def _answered(
    base: BaseVersion,
    suite: Suite,
    platform: Platform,
    subject: EvaluationSubject,
    on_progress: ProgressCallback | None,
) -> tuple[Evaluation, tuple[Example, ...]]:
    """Return the evaluation, and the items. With a judge model, its results are not marked yet."""
    from trans_peft.validation.evaluate import answer_with

    folder = None if subject.folder is None else subject.folder()
    template = None if folder is None else saved_template(folder)
    kind, files = subject.engines.kind_for(suite), base_folder(base, platform)
    with opened(kind, files, suite.dtype, folder, platform) as (loaded, engine):
        tokenized = tokenized_suite_for(suite, loaded, platform, template)
        found = answer_with(
            engine,
            tokenized,
            weights_sha256=subject.weights_sha256,
            base_fingerprint_sha256=base.fingerprint_sha256,
            drafts=subject.drafts(suite.name),
            on_progress=progress_reporter(on_progress, subject.evaluated_on(suite, base)),
        )
    return with_groups(found, tokenized.examples), tokenized.examples


def with_groups(evaluation: Evaluation, examples: Sequence[Example]) -> Evaluation:
    """Return an evaluation with the cluster and the slice of each item, from its example."""
    by_id = {example.id: example for example in examples}
    items = (
        replace(item, cluster=by_id[item.id].cluster, slice=by_id[item.id].slice)
        for item in evaluation.items
    )
    return replace(evaluation, items=tuple(items))
