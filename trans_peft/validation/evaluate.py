"""Evaluate one model, with or without an adapter, on one suite: item by item, right or wrong."""

import time
from collections.abc import Collection, Mapping, Sequence
from hashlib import sha256
from typing import Any

from trans_peft.data import Example
from trans_peft.domain.evaluation import Evaluation, ItemResult, Suite
from trans_peft.errors import InvalidSpecError
from trans_peft.validation.decoding.batching import Progress
from trans_peft.validation.decoding.generation import generate
from trans_peft.validation.decoding.likelihoods import choose
from trans_peft.validation.rules.multiple_choice import Measure
from trans_peft.validation.tokenized_suite import TokenizedSuite, prepare

__all__ = ["answer", "check_dtype", "context_of", "evaluate"]


def evaluate(
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
    """Answer a suite's examples once: `answer` of what `prepare` makes of them.

    `may_lack` names the guards of the sandbox for programs that this machine may lack.
    Everything is checked before the model is asked anything. Errors as both of these.
    """
    check_dtype(model, suite)
    return answer(
        model,
        prepare(tokenizer, suite, examples, context=context_of(model), may_lack=may_lack),
        weights_sha256=weights_sha256,
        base_fingerprint_sha256=base_fingerprint_sha256,
        drafts=drafts,
        batch_size=batch_size,
        on_progress=on_progress,
    )


def answer(
    model: Any,
    questions: TokenizedSuite,
    *,
    weights_sha256: str,
    base_fingerprint_sha256: str,
    drafts: Mapping[str, str] | None = None,
    batch_size: int | None = None,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Let a model answer questions, mark each answer, and return the results per item.

    Answers are decoded greedily, or chosen by likelihood where the suite's scoring is `choice`.
    `weights_sha256` is the adapter's (or `BARE`), `base_fingerprint_sha256` the base's: they become
    part of the evaluation's key. `drafts` are answers by item id that are expected, such as those
    on another base, and save time where they are right; where there is none, the right answer is
    expected. No draft changes a result. An answer's text is kept only if the suite says so. The
    model is left as it was found; `on_progress` gets the items done and the items in all.

    InvalidSpecError where the suite wants another dtype than the model's; EvaluationError: see
    `generate`, `choose`.
    """
    started = time.perf_counter()
    suite, examples = questions.suite, questions.examples
    check_dtype(model, suite)
    near_ties = 0
    if suite.is_choice:
        answers = choose(
            model,
            examples,
            questions.prompts,
            questions.choices,
            measure=Measure(suite.scoring.partition(":")[2]),
            batch_size=batch_size,
            on_progress=on_progress,
        )
    else:
        generated = generate(
            model,
            questions.tokenizer,
            questions.prompts,
            max_new_tokens=suite.max_new_tokens,
            stop=suite.stop,
            end_tokens=questions.end_tokens,
            drafts=questions.drafts(drafts or {}),
            batch_size=batch_size,
            on_progress=on_progress,
        )
        answers, near_ties = generated.texts, generated.near_ties
    return Evaluation(
        suite=suite.name,
        weights_sha256=weights_sha256,
        base_fingerprint_sha256=base_fingerprint_sha256,
        suite_sha256=suite.suite_sha256,
        decoding_sha256=suite.decoding_sha256,
        items=tuple(
            ItemResult(
                id=example.id,
                correct=questions.mark(number, said),
                answer_sha256=sha256(said.encode()).hexdigest(),
                answer=said if suite.keep_answers else None,
            )
            for number, (example, said) in enumerate(zip(examples, answers, strict=True))
        ),
        seconds=time.perf_counter() - started,
        near_ties=near_ties,
    )


def context_of(model: Any) -> int | None:
    """Return how many tokens a text may have, question and answer; None where nothing is said."""
    return getattr(model.config, "max_position_embeddings", None)


def check_dtype(model: Any, suite: Suite) -> None:
    """Raise InvalidSpecError unless the model's dtype is the one that the suite is decoded in."""
    found = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    if found != suite.dtype:
        raise InvalidSpecError(
            f"suite {suite.name!r} is decoded in another dtype than the model's",
            expected=suite.dtype,
            found=found,
            do="load the base in the suite's dtype: the dtype is part of the result's key",
        )
