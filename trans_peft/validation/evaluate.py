"""Evaluate a model, with or without an adapter, on a suite, item by item."""

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
    before the model runs. Raises what `prepare` and `answer` raise.
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

    Answers are decoded greedily, or chosen by log-likelihood if the suite's scoring is `choice`.

    Args:
        weights_sha256: hash of the adapter's weights, or `BARE`; part of the evaluation's key.
        base_fingerprint_sha256: hash of the base's fingerprint; part of the evaluation's key.
        drafts: expected answers by item id, such as those on another base; by default the right
            answers. Correct drafts save time. No draft changes a result.
        batch_size: items in a batch; by default 32.
        on_progress: called with the items done and the total.

    The texts of answers are kept only if the suite has `keep_answers`. The model's training modes
    are restored. Raises InvalidSpecError if the model's dtype is not the suite's; for
    EvaluationError see `generate` and `choose`.
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
                correct=questions.is_correct(number, text),
                answer_sha256=sha256(text.encode()).hexdigest(),
                answer=text if suite.keep_answers else None,
            )
            for number, (example, text) in enumerate(zip(examples, answers, strict=True))
        ),
        seconds=time.perf_counter() - started,
        near_ties=near_ties,
    )


def context_of(model: Any) -> int | None:
    """Return the model's context length in tokens, None if its config does not contain one."""
    return getattr(model.config, "max_position_embeddings", None)


def check_dtype(model: Any, suite: Suite) -> None:
    """Raise InvalidSpecError unless the model has the suite's dtype."""
    found = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    if found != suite.dtype:
        raise InvalidSpecError(
            f"the model does not have the dtype of suite {suite.name!r}",
            expected=suite.dtype,
            found=found,
            do="load the base in the suite's dtype, which is part of the evaluation's key",
        )
