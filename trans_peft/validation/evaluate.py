"""Evaluate one model, with or without an adapter, on one suite: item by item, right or wrong."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any

from trans_peft.data import Example
from trans_peft.domain.evaluation import Evaluation, ItemResult, Suite
from trans_peft.errors import DataError, InvalidSpecError
from trans_peft.validation.generation import generate
from trans_peft.validation.scoring import marker

__all__ = ["evaluate"]

_SHOWN = 20


def evaluate(
    model: Any,
    tokenizer: Any,
    suite: Suite,
    examples: Sequence[Example],
    *,
    weights_sha256: str,
    base_fingerprint_sha256: str,
    batch_size: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Answer a suite's examples greedily, mark each answer, and return the results per item.

    `weights_sha256` is the adapter's (or `BARE`), `base_fingerprint_sha256` the base's: they become
    part of the evaluation's key. An answer's text is kept only if the suite says so. The model is
    left as it was found; `on_progress` gets the items done and the items in all.

    Everything is checked before the model is asked anything. InvalidSpecError: the suite is not
    pinned, has no such scoring, or wants another dtype than the model's. DataError, with every
    item: no items, ids that are not unique, items that do not fit the context, prompts that the
    tokenizer cuts differently when the answer follows. EvaluationError: see `generate_ids`.
    """
    started = time.perf_counter()
    is_right = marker(suite)
    suite_sha256, decoding_sha256 = suite.suite_sha256, suite.decoding_sha256
    _check_dtype(model, suite)
    examples = examples[: suite.limit]
    prompts = [example.prompt_ids(tokenizer) for example in examples]
    _check_items(model, tokenizer, suite, examples, prompts)
    answers = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=suite.max_new_tokens,
        stop=suite.stop,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    return Evaluation(
        suite=suite.name,
        weights_sha256=weights_sha256,
        base_fingerprint_sha256=base_fingerprint_sha256,
        suite_sha256=suite_sha256,
        decoding_sha256=decoding_sha256,
        items=tuple(
            ItemResult(
                id=example.id,
                correct=is_right(answer, example.completion),
                answer_sha256=sha256(answer.encode()).hexdigest(),
                answer=answer if suite.keep_answers else None,
            )
            for example, answer in zip(examples, answers, strict=True)
        ),
        seconds=time.perf_counter() - started,
    )


def _check_dtype(model: Any, suite: Suite) -> None:
    found = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    if found != suite.dtype:
        raise InvalidSpecError(
            f"suite {suite.name!r} is decoded in another dtype than the model's",
            expected=suite.dtype,
            found=found,
            do="load the base in the suite's dtype: the dtype is part of the result's key",
        )


def _check_items(
    model: Any,
    tokenizer: Any,
    suite: Suite,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
) -> None:
    if not examples:
        raise DataError(f"suite {suite.name!r} has no items", expected="at least one")
    counts = Counter(example.id for example in examples)
    problems = [
        f"item {id_}: {count} items have this id" for id_, count in counts.items() if count > 1
    ]
    context = getattr(model.config, "max_position_embeddings", None)
    for example, prompt in zip(examples, prompts, strict=True):
        length = len(prompt) + suite.max_new_tokens
        if not prompt:
            problems.append(f"item {example.id}: its prompt has no tokens")
        elif context is not None and length > context:
            problems.append(
                f"item {example.id}: {len(prompt)} tokens and {suite.max_new_tokens} new ones "
                f"are {length}, the context is {context}"
            )
        elif example.messages is None and example.full_ids(tokenizer)[: len(prompt)] != prompt:
            problems.append(
                f"item {example.id}: with its answer the end of the prompt becomes other tokens: "
                "move the white space from the prompt's end to the answer's start"
            )
    if problems:
        more = len(problems) - _SHOWN
        tail = [f"and {more} more"] if more > 0 else []
        raise DataError(
            f"suite {suite.name!r} has {len(problems)} items that cannot be evaluated:\n    "
            + "\n    ".join([*problems[:_SHOWN], *tail])
        )
