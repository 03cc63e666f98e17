"""Mark the answers to a suite with its judge model, which is loaded after the answers are written.

One model is in memory at a time. The marks of the labeled answers do not depend on an adapter.
They are computed once, before any other work, and stored like an evaluation.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trans_peft.bases.cache import download
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.data import Example, pin, read_examples
from trans_peft.domain.base import Fingerprint
from trans_peft.domain.evaluation import BARE, Evaluation, ItemResult, Suite
from trans_peft.domain.judge_model import JudgeModel
from trans_peft.errors import (
    DataError,
    EvaluationError,
    IntegrityError,
    InvalidSpecError,
    listed_lines,
)
from trans_peft.lifecycle.progress import ProgressCallback, progress_reporter
from trans_peft.ports import Platform, StoredFile

if TYPE_CHECKING:
    from trans_peft.models import LoadedBase

__all__ = ["judged", "labeled_marks", "pin_judge"]

_LEAST_LABELS = 20  # of right answers, and of wrong ones
_SLOPE_ALPHA = 0.002
_SHOWN = 20

_fingerprints: dict[tuple[str, tuple[StoredFile, ...]], Fingerprint] = {}
"""Fingerprints by the URI and the listing of the files: a judge model is read once a process."""


def pin_judge(judge: JudgeModel, platform: Platform) -> JudgeModel:
    """Return the judge model with the hashes of its base and of its labeled rows.

    What is pinned already keeps its hash.
    """
    labeled = judge.labeled
    return replace(
        judge,
        fingerprint_sha256=judge.fingerprint_sha256 or _fingerprint(judge, platform).digest,
        labeled=labeled if labeled.sha256 else pin(labeled, platform.store),
    )


def labeled_marks(
    suite: Suite, platform: Platform, *, on_progress: ProgressCallback | None = None
) -> tuple[tuple[bool, float], ...]:
    """Return whether each labeled answer is right, and the judge model's mark of it.

    The judge model is loaded only if the marks are not stored. Raises DataError for invalid labels,
    IntegrityError if the files of the judge model changed, what `mark_answers` raises, and
    InvalidSpecError if the marks do not tell right answers from wrong ones.
    """
    judge = suite.judge
    assert judge is not None
    marks = Evaluation(
        suite=suite.name,
        weights_sha256=BARE,
        base_fingerprint_sha256=judge.fingerprint_sha256,
        suite_sha256=judge.sha256,
        decoding_sha256="labeled",
        items=(ItemResult("", False),),
    )
    stored = platform.evaluations.get(marks.key)
    if stored is None:
        examples, labels = _labeled(judge, platform)
        answers = [(example, example.completion) for example in examples]
        found = _marks(judge, answers, f"labeled answers of {suite.name}", platform, on_progress)
        items = [
            ItemResult(example.id, mark, slice="right" if label else "wrong")
            for example, label, mark in zip(examples, labels, found, strict=True)
        ]
        stored = replace(marks, items=tuple(items))
        platform.evaluations.put(stored)
    pairs = tuple((item.slice == "right", float(item.correct)) for item in stored.items)
    _check_informative(suite.name, judge, pairs)
    return pairs


def judged(
    evaluation: Evaluation,
    examples: Sequence[Example],
    suite: Suite,
    platform: Platform,
    *,
    on_progress: ProgressCallback | None = None,
) -> Evaluation:
    """Return an evaluation with the judge model's marks as results.

    `evaluation` has the texts of the answers to `examples`. They stay in it only if the suite has
    `keep_answers`. Raises what `labeled_marks` raises.
    """
    judge = suite.judge
    assert judge is not None
    labeled = labeled_marks(suite, platform)
    of = evaluation.kept_answers
    answers = [(example, of[example.id]) for example in examples]
    found = _marks(judge, answers, f"answers to {suite.name}", platform, on_progress)
    marks = {example.id: mark for example, mark in zip(examples, found, strict=True)}
    items = tuple(
        replace(item, correct=marks[item.id], answer=item.answer if suite.keep_answers else None)
        for item in evaluation.items
    )
    return replace(evaluation, items=items, labeled=labeled)


def _marks(
    judge: JudgeModel,
    answers: Sequence[tuple[Example, str]],
    what: str,
    platform: Platform,
    on_progress: ProgressCallback | None,
) -> list[float]:
    from trans_peft.validation.engine import LoopEngine
    from trans_peft.validation.evaluate import context_of
    from trans_peft.validation.judge_model import mark_answers

    with _loaded(judge, platform) as base:
        try:
            return mark_answers(
                LoopEngine(base.model, base.tokenizer),
                base.tokenizer,
                judge,
                answers,
                context=context_of(base.model),
                on_progress=progress_reporter(on_progress, f"judge model: {what}"),
            )
        except (DataError, EvaluationError) as error:
            raise type(error)(f"the judge model {judge.uri}, {what}: {error}") from error


@contextmanager
def _loaded(judge: JudgeModel, platform: Platform) -> "Iterator[LoadedBase]":
    """Yield the judge model in memory, and free its memory afterwards."""
    from trans_peft.models import load_base, release_base

    folder = _folder(judge, platform)
    try:
        yield load_base(folder, judge.dtype)
    finally:
        release_base()


def _folder(judge: JudgeModel, platform: Platform) -> Path:
    found = _fingerprint(judge, platform)
    if found.digest != judge.fingerprint_sha256:
        raise IntegrityError(
            f"the judge model at {judge.uri} has changed since the suite was pinned",
            expected=f"fingerprint {judge.fingerprint_sha256}",
            found=f"fingerprint {found.digest}",
            do="restore its files, or give the suite another name and the new model",
        )
    return download(
        judge.uri,
        platform.store,
        platform.work_dir / "bases",
        fingerprint=found,
        limit_bytes=platform.cache_bytes,
    )


def _fingerprint(judge: JudgeModel, platform: Platform) -> Fingerprint:
    listed = judge.uri, platform.store.list(judge.uri)
    if listed not in _fingerprints:
        _fingerprints[listed] = fingerprint(judge.uri, platform.store)
    return _fingerprints[listed]


def _labeled(judge: JudgeModel, platform: Platform) -> tuple[tuple[Example, ...], list[bool]]:
    """Return the labeled answers, and whether each is right."""
    # The label is read as a slice: a column of a few values, which every row must have.
    examples = read_examples(replace(judge.labeled, slice="label"), platform.store)
    labels = [judge.is_right(example.slice) for example in examples]
    problems = [
        f"{example.location}: the label {example.slice!r}"
        for example, label in zip(examples, labels, strict=True)
        if label is None
    ]
    if problems:
        raise DataError(
            f"{judge.labeled.uri}: {len(problems)} labels are invalid\n    "
            + "\n    ".join(listed_lines(problems, _SHOWN)),
            expected="one of the judge model's choices with the mark 0 or 1, without white space "
            "around it",
        )
    right = [label for label in labels if label]
    if min(len(right), len(labels) - len(right)) < _LEAST_LABELS:
        raise DataError(
            f"{judge.labeled.uri} has too few labels to correct a judge model's marks",
            expected=f"at least {_LEAST_LABELS} right and {_LEAST_LABELS} wrong answers",
            found=f"{len(right)} right and {len(labels) - len(right)} wrong answers",
            do="label more answers; a hundred of each cost little power",
        )
    return examples, [bool(label) for label in labels]


def _check_informative(suite: str, judge: JudgeModel, pairs: Sequence[tuple[bool, float]]) -> None:
    from trans_peft.validation.statistics.judged import LabeledMarks

    marks = LabeledMarks.of(pairs)
    low, _ = marks.slope_bounds(_SLOPE_ALPHA)
    if low > 0:
        return
    right, wrong = (sum(part) / len(part) for part in (marks.right, marks.wrong))
    raise InvalidSpecError(
        f"the judge model of suite {suite!r} does not tell right answers from wrong ones",
        expected="higher marks for the answers that people labeled as right",
        found=f"a mean mark of {right:.3f} for {len(marks.right)} right answers, and of "
        f"{wrong:.3f} for {len(marks.wrong)} wrong ones (one-sided level "
        f"{100 * _SLOPE_ALPHA:g} %)",
        do=f"change the prompt of {judge.uri}, use another model, or label more answers",
    )
