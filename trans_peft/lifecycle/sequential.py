"""Evaluate an adapter on a new base item batch by item batch, until the verdict is certain."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import (
    EngineKind,
    Evaluation,
    GatePolicy,
    Prefix,
    Suite,
    prefix_key,
)
from trans_peft.lifecycle.base_files import base_folder
from trans_peft.lifecycle.engines import opened
from trans_peft.lifecycle.evaluation import (
    BARE_BASE,
    EvaluationSubject,
    evaluate_on,
    tokenized_suite_for,
    with_groups,
)
from trans_peft.lifecycle.progress import ProgressCallback, progress_reporter
from trans_peft.ports import Engine, Platform
from trans_peft.text.saved_template import saved_template
from trans_peft.validation.statistics.sequential import (
    EvaluatedModel,
    SequentialGate,
    SequentialSuiteTest,
)

__all__ = ["evaluate_sequentially"]


def evaluate_sequentially(
    policy: GatePolicy,
    base: BaseVersion,
    suites: Sequence[Suite],
    platform: Platform,
    subject: EvaluationSubject,
    *,
    on_progress: ProgressCallback | None = None,
) -> tuple[dict[str, Evaluation], dict[str, Evaluation]]:
    """Return the evaluations of the adapter and of the bare base that the verdict needed.

    Both are by suite name. A suite without any evaluated item is missing. Items of a required suite
    are evaluated in a seeded order, starting after the longest stored part, and the new part is
    stored. Other suites are evaluated as a whole. `subject.reference` must hold the adapter's
    evaluations on the base that it was trained on, for every suite, by the engines of `subject`.
    """
    gate = SequentialGate(policy, subject.reference, base.fingerprint_sha256)
    named = {suite.name: suite for suite in suites}
    states = {
        EvaluatedModel.CANDIDATE: _ModelState(subject),
        EvaluatedModel.BARE: _ModelState(replace(BARE_BASE, engines=subject.engines)),
    }
    with _BatchEvaluator(base, platform, on_progress) as evaluator:
        while (request := gate.next_request()) is not None:
            state, suite, test = (
                states[request.model],
                named[request.suite],
                gate.suites[request.suite],
            )
            if suite.name not in state.evaluations:
                state.evaluations[suite.name] = _stored(base, suite, test, state.subject, platform)
            known = state.evaluations[suite.name]
            items = {item.id: item for item in known.items} if known else {}
            if missing := [id_ for id_ in request.ids if id_ not in items]:
                chunk = evaluator.evaluate(
                    state.subject, suite, missing, before=len(items), total=len(test.order)
                )
                reference = subject.reference[suite.name]
                state.evaluations[suite.name] = _joined(known, chunk, test, reference)
                state.new.add(suite.name)
                items |= {item.id: item for item in chunk.items}
            gate.observe(suite.name, request.model, [items[id_] for id_ in request.ids])

    def results(state: _ModelState) -> dict[str, Evaluation]:
        found = {name: part for name, part in state.evaluations.items() if part is not None}
        labels = base.ref.labels | state.subject.labels
        for name in sorted(state.new):
            platform.evaluations.put(found[name], labels=labels)
        others = [suite for suite in suites if suite.name not in gate.suites]
        return found | evaluate_on(base, others, platform, state.subject, on_progress=on_progress)

    return results(states[EvaluatedModel.CANDIDATE]), results(states[EvaluatedModel.BARE])


@dataclass
class _ModelState:
    """The evaluations of one model so far, by suite name; `new` names those that are not stored."""

    subject: EvaluationSubject
    evaluations: dict[str, Evaluation | None] = field(default_factory=dict)
    new: set[str] = field(default_factory=set)


def _stored(
    base: BaseVersion,
    suite: Suite,
    test: SequentialSuiteTest,
    subject: EvaluationSubject,
    platform: Platform,
) -> Evaluation | None:
    """Return the whole evaluation from the store, or else the longest stored part of it."""
    whole = subject.evaluation_key(suite, base)
    n = len(test.order)
    ends = [end for end in reversed(test.batch_ends) if end < n]
    keys = [whole, *(prefix_key(whole, Prefix(n, test.seed), end) for end in ends)]
    return next((found for key in keys if (found := platform.evaluations.get(key))), None)


def _joined(
    known: Evaluation | None, chunk: Evaluation, test: SequentialSuiteTest, reference: Evaluation
) -> Evaluation:
    """Return both parts as one evaluation. A complete suite is in the order of the suite."""
    before = known.items if known else ()
    items = {item.id: item for item in (*before, *chunk.items)}
    n = len(test.order)
    ids = test.order[: len(items)] if len(items) < n else [item.id for item in reference.items]
    return replace(
        chunk,
        items=tuple(items[id_] for id_ in ids),
        seconds=chunk.seconds + (known.seconds if known else 0.0),
        near_ties=chunk.near_ties + (known.near_ties if known else 0),
        prefix=Prefix(n, test.seed) if len(items) < n else None,
    )


@dataclass
class _LoadedSubject:
    """One subject on the loaded base, in one dtype. `template` is the adapter's chat template."""

    subject: EvaluationSubject
    kind: EngineKind
    dtype: str
    base: Any
    engine: Engine
    template: str | None


class _BatchEvaluator:
    """Evaluates batches of items. The adapter stays attached between batches of one subject."""

    def __init__(
        self, base: BaseVersion, platform: Platform, on_progress: ProgressCallback | None
    ) -> None:
        self._base, self._platform, self._on_progress = base, platform, on_progress
        self._stack = ExitStack()
        self._loaded: _LoadedSubject | None = None

    def __enter__(self) -> "_BatchEvaluator":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def evaluate(
        self,
        subject: EvaluationSubject,
        suite: Suite,
        ids: Sequence[str],
        *,
        before: int,
        total: int,
    ) -> Evaluation:
        from trans_peft.validation.evaluate import answer_with

        loaded = self._load(subject, suite)
        questions = tokenized_suite_for(suite, loaded.base, self._platform, loaded.template)
        found = answer_with(
            loaded.engine,
            questions.only(ids),
            weights_sha256=subject.weights_sha256,
            base_fingerprint_sha256=self._base.fingerprint_sha256,
            drafts=subject.drafts(suite.name),
            on_progress=progress_reporter(
                self._on_progress,
                subject.evaluated_on(suite, self._base),
                before=before,
                total=total,
            ),
        )
        return with_groups(found, questions.examples)

    def _load(self, subject: EvaluationSubject, suite: Suite) -> _LoadedSubject:
        loaded, kind, dtype = self._loaded, subject.engines.kind_for(suite), suite.dtype
        if (
            loaded is None
            or loaded.subject is not subject
            or (loaded.kind, loaded.dtype) != (kind, dtype)
        ):
            self._stack.close()  # detaches the previous adapter from the shared base
            self._loaded = loaded = None  # vLLM needs the memory of a base that nothing refers to
            folder = None if subject.folder is None else subject.folder()
            base, engine = self._stack.enter_context(
                opened(
                    kind,
                    base_folder(self._base, self._platform),
                    dtype,
                    folder,
                    self._platform,
                )
            )
            template = None if folder is None else saved_template(folder)
            self._loaded = loaded = _LoadedSubject(subject, kind, dtype, base, engine, template)
        return loaded
