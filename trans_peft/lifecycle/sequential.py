"""Answers on a new base, asked for only as far as the verdict on an adapter needs them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import BARE, Evaluation, GatePolicy, Prefix, Suite, prefix_key
from trans_peft.lifecycle.evaluations import base_folder, evaluate_on
from trans_peft.lifecycle.progress import ProgressCallback, progress_reporter
from trans_peft.lifecycle.questions import tokenized_suite_for
from trans_peft.ports import Platform
from trans_peft.text.saved_template import saved_template
from trans_peft.validation.statistics.sequential import (
    Arm,
    SequentialGate,
    SequentialSuiteTest,
    batch_ends,
)

__all__ = ["evaluate_sequentially"]


def evaluate_sequentially(
    policy: GatePolicy,
    base: BaseVersion,
    suites: Sequence[Suite],
    reference: Mapping[str, Evaluation],
    platform: Platform,
    *,
    adapter: Callable[[], Path],
    weights_sha256: str,
    labels: Mapping[str, str] | None = None,
    on_progress: ProgressCallback | None = None,
) -> tuple[dict[str, Evaluation], dict[str, Evaluation]]:
    """Return what the adapter and what the bare base answered until the verdict was known.

    By suite name; a suite of which nothing was asked is missing. Required suites are asked in their
    seeded order and kept as parts (asking starts where the longest part in the store ends), the
    others whole. `reference` is the adapter's whole result on the base it was trained on; the other
    arguments are `evaluate_on`'s.
    """
    gate = SequentialGate(policy, reference, base.fingerprint_sha256)
    named = {suite.name: suite for suite in suites}
    arms = {
        Arm.CANDIDATE: _Side(weights_sha256, adapter, dict(labels or {}), reference),
        Arm.BARE: _Side(BARE, None, {}, {}),
    }
    with _Respondent(base, platform, on_progress) as respondent:
        while (request := gate.next_request()) is not None:
            arm, suite, test = arms[request.arm], named[request.suite], gate.suites[request.suite]
            if suite.name not in arm.asked:
                arm.asked[suite.name] = _stored(base, suite, test, arm, platform)
            known = arm.asked[suite.name]
            answered = {item.id: item for item in known.items} if known else {}
            if missing := [id_ for id_ in request.ids if id_ not in answered]:
                chunk = respondent.answer(arm, suite, missing, len(answered), len(test.order))
                arm.asked[suite.name] = _joined(known, chunk, test, reference[suite.name])
                arm.new.add(suite.name)
                answered |= {item.id: item for item in chunk.items}
            gate.observe(suite.name, request.arm, [answered[id_] for id_ in request.ids])

    def results(arm: _Side) -> dict[str, Evaluation]:
        asked = {name: found for name, found in arm.asked.items() if found is not None}
        for name in sorted(arm.new):
            place = {"family": base.family, "base": base.version}
            platform.evaluations.put(asked[name], labels=place | arm.labels)
        return asked | evaluate_on(
            base,
            [suite for suite in suites if suite.name not in gate.suites],
            platform,
            adapter=arm.adapter,
            weights_sha256=arm.weights_sha256,
            elsewhere=arm.elsewhere,
            labels=arm.labels,
            on_progress=on_progress,
        )

    return results(arms[Arm.CANDIDATE]), results(arms[Arm.BARE])


class _Side:
    """Who answers, and what of each suite is answered; `new`: what the store does not hold yet."""

    def __init__(
        self,
        weights_sha256: str,
        adapter: Callable[[], Path] | None,
        labels: dict[str, str],
        elsewhere: Mapping[str, Evaluation],
    ) -> None:
        self.weights_sha256, self.adapter, self.labels = weights_sha256, adapter, labels
        self.elsewhere = elsewhere
        self.asked: dict[str, Evaluation | None] = {}
        self.new: set[str] = set()


def _stored(
    base: BaseVersion, suite: Suite, test: SequentialSuiteTest, arm: _Side, platform: Platform
) -> Evaluation | None:
    """Return the whole evaluation from the store, or else the longest part of it."""
    whole = suite.evaluation_key(arm.weights_sha256, base.fingerprint_sha256)
    n = len(test.order)
    ends = [end for end in reversed(batch_ends(n)) if end < n]
    keys = [whole, *(prefix_key(whole, Prefix(n, test.seed), end) for end in ends)]
    return next((found for key in keys if (found := platform.evaluations.get(key))), None)


def _joined(
    known: Evaluation | None, chunk: Evaluation, test: SequentialSuiteTest, reference: Evaluation
) -> Evaluation:
    """Return both as one; the whole suite, once it is there, in the suite's own order."""
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
class _Lent:
    """The base, and the model that is ready to answer for one side on it, in one dtype.

    `template` is the adapter's own chat template; None: the base's.
    """

    arm: _Side
    dtype: str
    base: Any
    model: Any
    template: str | None


class _Respondent:
    """Answers batches; the adapter stays on the base from one batch to the next."""

    def __init__(
        self, base: BaseVersion, platform: Platform, on_progress: ProgressCallback | None
    ) -> None:
        self._base, self._platform, self._on_progress = base, platform, on_progress
        self._stack = ExitStack()
        self._lent: _Lent | None = None

    def __enter__(self) -> "_Respondent":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def answer(
        self, arm: _Side, suite: Suite, ids: Sequence[str], done: int, total: int
    ) -> Evaluation:
        from trans_peft.validation.evaluate import answer

        lent = self._lend(arm, suite.dtype)
        there = arm.elsewhere.get(suite.name)
        return answer(
            lent.model,
            tokenized_suite_for(suite, lent.base, self._platform, lent.template).only(ids),
            weights_sha256=arm.weights_sha256,
            base_fingerprint_sha256=self._base.fingerprint_sha256,
            drafts=there.kept_answers if there is not None else {},
            on_progress=progress_reporter(
                self._on_progress,
                arm.labels.get("adapter", "bare base"),
                suite.name,
                self._base.version,
                before=done,
                total=total,
            ),
        )

    def _lend(self, arm: _Side, dtype: str) -> _Lent:
        from trans_peft.models import load_base
        from trans_peft.transfer.load_adapter import attached

        if self._lent is None or (self._lent.arm, self._lent.dtype) != (arm, dtype):
            self._stack.close()  # the adapter leaves the base before anybody else uses it
            loaded = load_base(base_folder(self._base, self._platform), dtype)
            model, template = loaded.model, None
            if arm.adapter is not None:
                folder = arm.adapter()
                template = saved_template(folder)
                model = self._stack.enter_context(attached(model, folder))
            self._lent = _Lent(arm, dtype, loaded, model, template)
        return self._lent
