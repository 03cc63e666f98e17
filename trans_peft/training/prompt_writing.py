"""Let a base write prompts: after a list of approved prompts, or with a prompt model.

A prompt model is an adapter that was trained on the prompts of training rows
(`prompt_model_rows`). Without differential privacy, what it writes is kept only if it repeats no
rare part of them (`trans_peft.data.rare_text`).
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from sys import maxsize
from typing import Any

import torch
from transformers import GenerationConfig

from trans_peft.data import ChatMessage, Example
from trans_peft.data.overlap import distinct_from
from trans_peft.data.rare_text import SHARED_BY, RareText
from trans_peft.data.rows import NO_ANSWER
from trans_peft.errors import DataError
from trans_peft.models import LoadedBase
from trans_peft.transfer.load_adapter import attached
from trans_peft.validation.decoding.batching import in_batches
from trans_peft.validation.decoding.cache_support import cache_support
from trans_peft.validation.evaluate import context_of

__all__ = ["PromptLimits", "PromptTraits", "like_examples", "prompt_model_rows", "sampled"]

_SEPARATORS = ("###", "-----", "=====", "@@@@@", "~~~~~")
"""Lines that end a prompt. The first one that occurs in the fewest prompts is used."""
_START = "Prompt"  # no tokenizer joins letters and the line break that follows
_EXAMPLES_SHOWN = 8  # in one pass of the base, in random order
_ROUNDS = 12  # of the base, after approved prompts
_SAMPLE_ROUNDS = 240  # of a prompt model
_FRUITLESS_ROUNDS = 24
"""Rounds without a new prompt after which a prompt model is not sampled further."""
_BATCH = 32
_LENGTH_FACTOR = 1.5  # tokens of a written prompt, relative to the longest example
_TOP_P = 0.95


def like_examples(
    base: LoadedBase, examples: Sequence[Example], items: Sequence[str], count: int, seed: int = 0
) -> list[Example]:
    """Return up to `count` prompts that the base writes as continuations of a list of examples.

    Each is sampled (top-p 0.95) after some examples in random order, and ends at the separator. It
    differs from the examples, the items and earlier prompts. A chat example gives its last message.
    Raises DataError if a single example does not fit into the model's context.
    """
    texts = [_last_text(example) for example in examples]
    known = [*items, *(example.prompt_text() for example in examples)]
    return _distinct(_continuations(base, texts, seed), examples[0], known, count)


@dataclass(frozen=True)
class PromptTraits:
    """What is known about the prompts that a prompt model learns, besides its weights.

    Attributes:
        separator: line that ends a prompt.
        shape: an example whose system message all written prompts get.
        texts: the training prompts. Written prompts are no longer than they are, and repeat no rare
            part of them. Empty if they must not be read (differential privacy).
    """

    separator: str
    shape: Example
    texts: tuple[str, ...] = ()

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "PromptTraits":
        """Return the traits that fit the training rows best."""
        texts = tuple(map(_last_text, examples))
        return cls(_separator(texts), _common_shape(examples), texts)

    @classmethod
    def independent_of_rows(cls, *, chat: bool) -> "PromptTraits":
        """Return traits that depend on no training row, only on whether the rows are chats."""
        return cls(_SEPARATORS[0], Example("", "", NO_ANSWER, () if chat else None))


def prompt_model_rows(examples: Sequence[Example], separator: str) -> list[Example]:
    """Return the rows on which a prompt model is trained: prompts as answers to a fixed start.

    Prompts that contain the separator are left out. DataError if all of them do.
    """
    rows = [
        Example(example.id, _START, f"\n{text}\n{separator}")
        for example in examples
        if separator not in (text := _last_text(example))
    ]
    if not rows:
        raise DataError(
            "no prompt model can be trained on these prompts",
            expected=f"prompts without one of {' '.join(_SEPARATORS)}",
            found="all of them in every prompt",
            do="remove synthetic_prompts from the recipe, or these lines from the prompts",
        )
    return rows


@dataclass(frozen=True)
class PromptLimits:
    """Number of prompts to write, and the tokens that a written prompt may have."""

    count: int
    max_length: int


def sampled(
    base: LoadedBase,
    prompt_model: Path,
    traits: PromptTraits,
    items: Sequence[str],
    limits: PromptLimits,
    seed: int = 0,
) -> list[Example]:
    """Return up to `limits.count` prompts that a prompt model writes.

    `prompt_model` is the PEFT folder of an adapter that was trained on `prompt_model_rows`. A
    prompt that repeats a rare part of `traits.texts` is left out (`RareText`). A chat has one
    message, because the model learned last messages only, and the system message of `traits.shape`,
    which at least three examples and half of all share.
    """
    rare = RareText(traits.texts)
    with attached(base.model, prompt_model) as model:
        written = (
            [text for text in texts if not rare.occurs_in(text)]
            for texts in _samples(model, base.tokenizer, traits, limits.max_length, seed)
        )
        return _distinct(written, traits.shape, items, limits.count)


def _distinct(
    rounds: Iterator[list[str]], shape: Example, known: Sequence[str], count: int
) -> list[Example]:
    """Return the first `count` prompts that match no known text and no earlier prompt."""
    found: list[Example] = []
    written = fruitless = 0
    for texts in rounds:
        before = len(found)
        new = [
            _with_text(shape, text, f"written-{number}")
            for number, text in enumerate(texts, start=written)
        ]
        written += len(new)
        found = distinct_from([*found, *new], known, text=Example.prompt_text, limit=count)
        fruitless = 0 if len(found) > before else fruitless + 1
        if len(found) == count or fruitless == _FRUITLESS_ROUNDS:
            break
    return found


def _continuations(base: LoadedBase, examples: Sequence[str], seed: int) -> Iterator[list[str]]:
    """Yield the texts that the base wrote in each round, after lists of examples."""
    tokenizer: Any = base.tokenizer
    separator = _separator(examples)
    if any(separator in text for text in examples):
        raise DataError(
            "the approved prompts contain every separator of a list of prompts",
            expected=f"one of {' '.join(_SEPARATORS)} that occurs in no prompt",
            do="remove these lines from the approved prompts",
        )
    between = f"\n\n{separator}\n\n"
    longest = max(len(ids) for ids in tokenizer(list(examples))["input_ids"])
    gap = len(tokenizer(between)["input_ids"])
    new_tokens = int(_LENGTH_FACTOR * longest) + gap
    fitting = ((context_of(base.model) or maxsize) - new_tokens) // (longest + gap)
    if fitting < 1:
        raise DataError(
            "an approved prompt is too long for the base to write others like it",
            expected=f"{context_of(base.model)} tokens for a prompt and a longer one after it",
            found=f"a prompt of {longest} tokens",
            do="approve shorter prompts",
        )
    order = random.Random(seed)
    for number in range(_ROUNDS):
        lists = [
            order.sample(examples, min(_EXAMPLES_SHOWN, fitting, len(examples)))
            for _ in range(_BATCH)
        ]
        rows = tokenizer([between.join([*texts, ""]) for texts in lists])["input_ids"]
        end = f"\n\n{separator}\n"
        yield _written(base.model, tokenizer, rows, new_tokens, end, seed * _ROUNDS + number)


def _samples(
    model: Any, tokenizer: Any, traits: PromptTraits, max_length: int, seed: int
) -> Iterator[list[str]]:
    """Yield the texts that a prompt model wrote in each round."""
    end = f"\n{traits.separator}"
    start = tokenizer(_START)["input_ids"]
    new_tokens = min(max_length, (context_of(model) or maxsize) - len(start))
    if traits.texts:
        longest = max(len(ids) for ids in tokenizer(list(traits.texts))["input_ids"])
        new_tokens = min(new_tokens, longest + len(tokenizer(end)["input_ids"]) + 1)
    rows = [start] * _BATCH
    for number in range(_SAMPLE_ROUNDS):
        yield _written(model, tokenizer, rows, new_tokens, end, seed * _SAMPLE_ROUNDS + number)


def _written(
    model: Any, tokenizer: Any, rows: Sequence[list[int]], new_tokens: int, end: str, seed: int
) -> list[str]:
    """Return what a model writes after each row of token ids, if it ends with `end`."""
    settings = GenerationConfig(
        do_sample=True,
        top_p=_TOP_P,
        top_k=0,
        max_new_tokens=new_tokens,
        pad_token_id=_pad(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        texts = in_batches(
            rows,
            lambda batch: _continued(model, tokenizer, batch, settings),
            size=_BATCH if cache_support(model).batched else 1,
            describe=lambda row: f"the beginning of a prompt, {len(row)} tokens",
        )
    whole = (text.partition(end)[0].strip("\n") for text in texts if end in text)
    return [text for text in whole if text.strip()]


def _continued(
    model: Any, tokenizer: Any, rows: Sequence[list[int]], settings: GenerationConfig
) -> list[str]:
    """Return the continuation that the model samples for each row of token ids."""
    device = next(model.parameters()).device
    width, pad = max(map(len, rows)), _pad(tokenizer)
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    with torch.no_grad():
        out = model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=settings,
        )
    return list(tokenizer.batch_decode(out[:, width:], skip_special_tokens=True))


def _separator(texts: Sequence[str]) -> str:
    """Return the separator that occurs in the fewest texts."""
    return min(_SEPARATORS, key=lambda line: sum(line in text for text in texts))


def _pad(tokenizer: Any) -> int:
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


def _last_text(example: Example) -> str:
    return example.prompt if example.messages is None else example.messages[-2].content


def _with_text(shape: Example, text: str, name: str) -> Example:
    """Return a prompt with the text as its last message, after the example's system message."""
    if shape.messages is None:
        return Example(name, text, NO_ANSWER)
    turns = (*_system(shape), ChatMessage("user", text), ChatMessage("assistant", NO_ANSWER))
    return Example(name, "", NO_ANSWER, turns)


def _system(example: Example) -> tuple[ChatMessage, ...]:
    return tuple(turn for turn in example.messages or () if turn.role == "system")


def _common_shape(examples: Sequence[Example]) -> Example:
    """Return an example with the most frequent system message, or one without it if it is rare."""
    ((most_frequent, count),) = Counter(map(_system, examples)).most_common(1)
    shape = next(example for example in examples if _system(example) == most_frequent)
    if count >= max(SHARED_BY, len(examples) / 2) or shape.messages is None:
        return shape
    return replace(shape, messages=tuple(t for t in shape.messages if t.role != "system"))
