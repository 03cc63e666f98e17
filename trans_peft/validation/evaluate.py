"""Evaluate a model, with or without an adapter, on a suite, item by item."""

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from typing import Any, NamedTuple

from trans_peft.data import Example
from trans_peft.domain.evaluation import Evaluation, ItemResult, Suite
from trans_peft.errors import InvalidSpecError
from trans_peft.ports import Engine, Sampling
from trans_peft.validation.decoding.batching import Progress
from trans_peft.validation.decoding.likelihoods import choose
from trans_peft.validation.engine import LoopEngine, dtype_of
from trans_peft.validation.rules.multiple_choice import Measure
from trans_peft.validation.tokenized_suite import TokenizedSuite, prepare

__all__ = [
    "AskedAdapter",
    "MixedEvaluation",
    "answer",
    "answer_together",
    "answer_with",
    "check_dtype",
    "context_of",
    "evaluate",
]


@dataclass(frozen=True)
class AskedAdapter:
    """One adapter of a mixed batch, and its questions.

    Attributes:
        adapter: its name on the model; None for the bare base.
        questions: the suite.
        weights_sha256: hash of its weights, or `BARE`; part of the evaluation's key.
        drafts: expected answers by item id, as for `answer`.
    """

    adapter: str | None
    questions: TokenizedSuite
    weights_sha256: str
    drafts: Mapping[str, str] = field(default_factory=dict)

    @property
    def decoding(self) -> tuple[object, ...]:
        """What must be equal for two adapters to share a batch."""
        suite = self.questions.suite
        rule = suite.scoring if suite.is_choice else ""
        return suite.decoding_sha256, rule, self.questions.end_tokens


class MixedEvaluation(NamedTuple):
    """An evaluation from mixed batches, and the ids of its items that have a near tie.

    Alone, an adapter could answer these items differently within rounding.
    """

    evaluation: Evaluation
    near_tie_ids: tuple[str, ...]


def evaluate(  # noqa: PLR0913  the key's two hashes, and options
    model: Any,
    tokenizer: Any,
    suite: Suite,
    examples: Sequence[Example],
    *,
    weights_sha256: str,
    base_fingerprint_sha256: str,
    drafts: Mapping[str, str] | None = None,
    may_lack: Collection[str] = (),
    batch_size: int | None = None,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Tokenize a suite's examples with `prepare`, and evaluate the model on them with `answer`.

    `may_lack` are the sandbox guards that may be missing on this machine. All items are checked
    before the model runs. Raises what `prepare` and `answer` raise, and InvalidSpecError for a
    suite with a judge model, which `trans_peft.lifecycle.evaluation.evaluate_on` loads afterwards.
    """
    check_dtype(model, suite)
    if suite.judge is not None:
        raise InvalidSpecError(
            f"suite {suite.name!r} has a judge model, which cannot share memory with this model",
            do="evaluate it with trans_peft.lifecycle.evaluation.evaluate_on",
        )
    return answer(
        model,
        prepare(tokenizer, suite, examples, context=context_of(model), may_lack=may_lack),
        weights_sha256=weights_sha256,
        base_fingerprint_sha256=base_fingerprint_sha256,
        drafts=drafts,
        batch_size=batch_size,
        on_progress=on_progress,
    )


def answer(  # noqa: PLR0913  the key's two hashes, and options
    model: Any,
    questions: TokenizedSuite,
    *,
    weights_sha256: str,
    base_fingerprint_sha256: str,
    drafts: Mapping[str, str] | None = None,
    batch_size: int | None = None,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Generate an answer to each item, score the answers, and return the results by item.

    Answers are decoded greedily, sampled if the suite has a `temperature`, or chosen by
    log-likelihood if its scoring is `choice`. The result of an item with several answers is their
    mean.

    Args:
        weights_sha256: hash of the adapter's weights, or `BARE`; part of the evaluation's key.
        base_fingerprint_sha256: hash of the base's fingerprint; part of the evaluation's key.
        drafts: expected answers by item id, such as those on another base; by default the right
            answers. Correct drafts save time. No draft changes a result. With several answers to an
            item, the JSON list of all of them.
        batch_size: items in a batch; by default 32.
        on_progress: called with the items done and the total.

    The texts of answers are kept only if the suite has `keep_answers`, or a judge model, which
    marks them afterwards; until then the results are NaN. The model's training modes are restored.
    Raises InvalidSpecError if the model's dtype is not the suite's; for EvaluationError see
    `generate` and `choose`.
    """
    return answer_with(
        LoopEngine(model, questions.tokenizer, batch_size=batch_size),
        questions,
        weights_sha256=weights_sha256,
        base_fingerprint_sha256=base_fingerprint_sha256,
        drafts=drafts,
        on_progress=on_progress,
    )


def answer_with(
    engine: Engine,
    questions: TokenizedSuite,
    *,
    weights_sha256: str,
    base_fingerprint_sha256: str,
    drafts: Mapping[str, str] | None = None,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Return the evaluation of a suite by an engine, as `answer` does with the default engine.

    The engine's name is part of the evaluation's key, unless it is the default engine.
    """
    started = time.perf_counter()
    asked = AskedAdapter(None, questions, weights_sha256, drafts or {})
    found = _answers(engine, [asked], on_progress)
    seconds = time.perf_counter() - started
    return _evaluation(asked, found, base_fingerprint_sha256, engine.name, seconds)


def answer_together(
    model: Any,
    asked: Sequence[AskedAdapter],
    *,
    base_fingerprint_sha256: str,
    batch_size: int | None = None,
    on_progress: Progress | None = None,
) -> list[MixedEvaluation]:
    """Evaluate several adapters of one base in mixed batches; return the results in their order.

    `model` takes `adapter_names`, as `trans_peft.transfer.mixed_adapters.MixedModel` does. The
    answers equal those of `answer` for each adapter alone, except for items with a near tie. The
    seconds are divided by the numbers of items. Further arguments and errors are those of `answer`;
    an error is that of any of the adapters.

    Raises InvalidSpecError if the adapters have different decoding settings.
    """
    started = time.perf_counter()
    if len({one.decoding for one in asked}) > 1:
        raise InvalidSpecError(
            "adapters with different decoding settings cannot share batches",
            expected="the same max_new_tokens, stop strings, end tokens, dtype and sampling, or "
            "the same rule for choices",
            found=", ".join(sorted({one.questions.suite.name for one in asked})),
            do="group them by AskedAdapter.decoding",
        )
    samples = asked[0].questions.suite.samples
    adapters = [
        one.adapter for one in asked for _ in one.questions.examples for _ in range(samples)
    ]
    engine = LoopEngine(
        model, asked[0].questions.tokenizer, adapters=adapters, batch_size=batch_size
    )
    found = iter(_answers(engine, asked, on_progress))
    per_item_s = (time.perf_counter() - started) * samples / len(adapters)
    results = []
    for one in asked:
        examples = one.questions.examples
        own = list(islice(found, len(examples)))
        ties = (e.id for e, item in zip(examples, own, strict=True) if item.is_near_tie)
        seconds = per_item_s * len(examples)
        evaluation = _evaluation(one, own, base_fingerprint_sha256, engine.name, seconds)
        results.append(MixedEvaluation(evaluation, tuple(ties)))
    return results


class _Answers(NamedTuple):
    """The answers to an item, their near ties, and whether rounding may have decided about one."""

    texts: Sequence[str]
    near_ties: int
    is_near_tie: bool


def _answers(
    engine: Engine, asked: Sequence[AskedAdapter], on_progress: Progress | None
) -> list[_Answers]:
    """Return the answers of an engine to all items of all adapters."""
    first = asked[0].questions
    samples = first.suite.samples
    for one in asked:
        _check_dtype(engine.dtype, one.questions.suite)
    prompts = [prompt for one in asked for prompt in one.questions.prompts]
    if first.suite.is_choice:
        choices = [choices for one in asked for choices in one.questions.choices]
        found = engine.likelihoods(
            list(zip(prompts, choices, strict=True)), on_progress=on_progress
        )
        examples = [example for one in asked for example in one.questions.examples]
        measure = Measure(first.suite.scoring.partition(":")[2])
        chosen = choose(examples, choices, found, measure)
        return [_Answers([text], 0, tie) for text, tie in zip(*chosen, strict=True)]
    generated = engine.answers(
        [prompt for prompt in prompts for _ in range(samples)],
        max_new_tokens=first.suite.max_new_tokens,
        stop=first.suite.stop,
        end_tokens=first.end_tokens,
        drafts=[draft for one in asked for draft in one.questions.drafts(one.drafts)],
        sampling=_sampling(asked),
        on_progress=on_progress
        and (lambda done, total: on_progress(done // samples, len(prompts))),
    )
    answers = []
    for start in range(0, len(generated), samples):
        own = generated[start : start + samples]
        ties = sum(one.near_ties for one in own)
        answers.append(_Answers([one.text for one in own], ties, ties > 0))
    return answers


def _sampling(asked: Sequence[AskedAdapter]) -> Sampling | None:
    """Return the keys of all answers, and the settings, which all adapters share."""
    suite = asked[0].questions.suite
    if suite.temperature is None:
        return None
    examples = [example for one in asked for example in one.questions.examples]
    keys = [suite.answer_key(e.id, number) for e in examples for number in range(suite.samples)]
    return Sampling(suite.temperature, suite.top_p, keys)


def _evaluation(
    asked: AskedAdapter,
    answers: Sequence[_Answers],
    base_fingerprint_sha256: str,
    engine: str,
    seconds: float,
) -> Evaluation:
    questions, suite = asked.questions, asked.questions.suite
    return Evaluation(
        suite=suite.name,
        weights_sha256=asked.weights_sha256,
        base_fingerprint_sha256=base_fingerprint_sha256,
        suite_sha256=suite.suite_sha256,
        decoding_sha256=suite.decoding_sha256,
        items=tuple(_item(questions, number, found.texts) for number, found in enumerate(answers)),
        seconds=seconds,
        near_ties=sum(found.near_ties for found in answers),
        engine=engine,
    )


def _item(questions: TokenizedSuite, number: int, texts: Sequence[str]) -> ItemResult:
    """Return the result of the item at a position from the texts of its answers."""
    several = len(texts) > 1
    recorded = json.dumps(texts, ensure_ascii=False) if several else texts[0]
    scores = [questions.is_correct(number, text) for text in texts]
    return ItemResult(
        id=questions.examples[number].id,
        correct=sum(scores) / len(scores) if several else scores[0],
        answer_sha256=sha256(recorded.encode()).hexdigest(),
        answer=recorded if questions.suite.keep_answers or questions.suite.judge else None,
    )


def context_of(model: Any) -> int | None:
    """Return the model's context length in tokens, None if its config does not contain one."""
    return getattr(model.config, "max_position_embeddings", None)


def check_dtype(model: Any, suite: Suite) -> None:
    """Raise InvalidSpecError unless the model has the suite's dtype."""
    _check_dtype(dtype_of(model), suite)


def _check_dtype(found: str, suite: Suite) -> None:
    if found != suite.dtype:
        raise InvalidSpecError(
            f"the model does not have the dtype of suite {suite.name!r}",
            expected=suite.dtype,
            found=found,
            do="load the base in the suite's dtype, which is part of the evaluation's key",
        )
