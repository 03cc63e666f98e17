"""Evaluate one model, with or without an adapter, on one suite: item by item, right or wrong."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any

from trans_peft.data import Example
from trans_peft.domain.evaluation import Evaluation, ItemResult, Suite
from trans_peft.errors import DataError, InvalidSpecError
from trans_peft.validation.choice import choice_ids, choose
from trans_peft.validation.generation import generate
from trans_peft.validation.rules.choice import Measure
from trans_peft.validation.scoring import marker

__all__ = ["check_dtype", "evaluate"]

_SHOWN = 20
_CUT = (
    "the end of the prompt becomes other tokens: move the white space from the prompt's end to the "
    "answer's start"
)


def evaluate(
    model: Any,
    tokenizer: Any,
    suite: Suite,
    examples: Sequence[Example],
    *,
    weights_sha256: str,
    base_fingerprint_sha256: str,
    drafts: Mapping[str, str] | None = None,
    batch_size: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Answer a suite's examples, mark each answer, and return the results per item.

    Answers are decoded greedily, or chosen by likelihood where the suite's scoring is `choice`.
    `weights_sha256` is the adapter's (or `BARE`), `base_fingerprint_sha256` the base's: they become
    part of the evaluation's key. `drafts` are answers by item id that are expected, such as those
    on another base, and save time where they are right; where there is none, the right answer is
    expected. No draft changes a result. An answer's text is kept only if the suite says so. The
    model is left as it was found; `on_progress` gets the items done and the items in all.

    Everything is checked before the model is asked anything. InvalidSpecError: the suite is not
    pinned, has no such scoring, or wants another dtype than the model's. DataError, with every
    item: no items, ids that are not unique, items that do not fit the context, prompts that the
    tokenizer cuts differently when the answer follows, items without choices, references that no
    answer could equal. EvaluationError: see `generate`, `choose`.
    """
    started = time.perf_counter()
    is_right = marker(suite)
    suite_sha256, decoding_sha256 = suite.suite_sha256, suite.decoding_sha256
    check_dtype(model, suite)
    examples = examples[: suite.limit]
    prompts = [example.prompt_ids(tokenizer) for example in examples]
    _check_items(model, tokenizer, suite, examples, prompts, is_right)
    near_ties = 0
    if suite.is_choice:
        answers = choose(
            model,
            tokenizer,
            examples,
            measure=Measure(suite.scoring.partition(":")[2]),
            batch_size=batch_size,
            on_progress=on_progress,
        )
    else:
        expected = drafts or {}
        generated = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=suite.max_new_tokens,
            stop=suite.stop,
            drafts=[
                choice_ids(tokenizer, example, expected.get(example.id, example.completion), prompt)
                for example, prompt in zip(examples, prompts, strict=True)
            ],
            batch_size=batch_size,
            on_progress=on_progress,
        )
        answers, near_ties = generated.texts, generated.near_ties
    return Evaluation(
        suite=suite.name,
        weights_sha256=weights_sha256,
        base_fingerprint_sha256=base_fingerprint_sha256,
        suite_sha256=suite_sha256,
        decoding_sha256=decoding_sha256,
        items=tuple(
            ItemResult(
                id=example.id,
                correct=is_right(answer, example.reference or example.completion),
                answer_sha256=sha256(answer.encode()).hexdigest(),
                answer=answer if suite.keep_answers else None,
            )
            for example, answer in zip(examples, answers, strict=True)
        ),
        seconds=time.perf_counter() - started,
        near_ties=near_ties,
    )


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


def _check_items(
    model: Any,
    tokenizer: Any,
    suite: Suite,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    is_right: Callable[[str, str], bool],
) -> None:
    if not examples:
        raise DataError(f"suite {suite.name!r} has no items", expected="at least one")
    counts = Counter(example.id for example in examples)
    problems = [
        f"item {id_}: {count} items have this id" for id_, count in counts.items() if count > 1
    ]
    context = getattr(model.config, "max_position_embeddings", None)
    for example, prompt in zip(examples, prompts, strict=True):
        told = None
        if not prompt:
            told = "its prompt has no tokens"
        elif suite.is_choice:
            told = _choices_problem(tokenizer, example, prompt, context)
        elif context is not None and len(prompt) + suite.max_new_tokens > context:
            told = (
                f"{len(prompt)} tokens and {suite.max_new_tokens} new ones are "
                f"{len(prompt) + suite.max_new_tokens}, the context is {context}"
            )
        # Where answers are marked by something else, the completion is one of many right ones.
        elif not example.reference and _is_cut(tokenizer, example, example.completion, prompt):
            told = f"with its answer {_CUT}"
        if told is not None:
            problems.append(f"item {example.id}: {told}")
        try:
            is_right("", example.reference or example.completion)
        except DataError as error:
            problems.append(f"item {example.id}: {error}")
    if problems:
        more = len(problems) - _SHOWN
        tail = [f"and {more} more"] if more > 0 else []
        raise DataError(
            f"suite {suite.name!r} has {len(problems)} items that cannot be evaluated:\n    "
            + "\n    ".join([*problems[:_SHOWN], *tail])
        )


def _choices_problem(
    tokenizer: Any, example: Example, prompt: Sequence[int], context: int | None
) -> str | None:
    if not example.choices:
        return "it has no choices, and is to be answered by one of them"
    for choice in example.choices:
        if _is_cut(tokenizer, example, choice, prompt):
            return f"with the choice {choice!r} {_CUT}"
        length = len(prompt) + len(choice_ids(tokenizer, example, choice, prompt))
        if length == len(prompt):
            return f"the choice {choice!r} has no tokens"
        if context is not None and length > context:
            return f"with the choice {choice!r} it has {length} tokens, the context is {context}"
    return None


def _is_cut(tokenizer: Any, example: Example, answer: str, prompt: Sequence[int]) -> bool:
    """Whether the prompt's tokens are others once an answer follows (in a chat none can)."""
    if example.messages is not None:
        return False
    whole = list(tokenizer(text=example.prompt + answer)["input_ids"])
    return whole[: len(prompt)] != list(prompt)
