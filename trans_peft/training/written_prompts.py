"""Prompts that a base writes after examples that may be kept."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from sys import maxsize
from typing import Any

import torch
from transformers import GenerationConfig

from trans_peft.data import ChatMessage, Example
from trans_peft.data.overlap import distinct_from
from trans_peft.data.rows import NO_ANSWER
from trans_peft.errors import DataError
from trans_peft.models import LoadedBase
from trans_peft.validation.decoding.batching import in_batches
from trans_peft.validation.decoding.cache_support import cache_support
from trans_peft.validation.evaluate import context_of

__all__ = ["like_examples"]

_SEPARATORS = ("###", "-----", "=====", "@@@@@", "~~~~~")
"""Lines between the examples that the base continues. The first one that no example has is used."""
_EXAMPLES_SHOWN = 8  # in one pass of the base, in random order
_ROUNDS = 12
_BATCH = 32
_LENGTH_FACTOR = 1.5  # tokens of a written prompt, relative to the longest example


def like_examples(
    base: LoadedBase, examples: Sequence[Example], items: Sequence[str], count: int, seed: int = 0
) -> list[Example]:
    """Return up to `count` prompts that the base writes as continuations of a list of examples.

    Each is sampled (top-p 0.95) after some examples in random order, and ends at the separator. It
    differs from the examples, the items and earlier prompts. A chat example gives its last message.
    Raises DataError if a single example does not fit into the model's context.
    """
    known = [*items, *(example.prompt_text() for example in examples)]
    found: list[Example] = []
    written = 0
    for texts in _written(base, [_last_text(example) for example in examples], seed):
        new = [
            _with_text(examples[0], text, f"written-{number}")
            for number, text in enumerate(texts, start=written)
        ]
        written += len(new)
        found = distinct_from([*found, *new], known, text=Example.prompt_text, limit=count)
        if len(found) == count:
            break
    return found


def _written(base: LoadedBase, examples: Sequence[str], seed: int) -> Iterator[list[str]]:
    """Yield the texts that the base wrote in each round."""
    tokenizer: Any = base.tokenizer
    separator = next(
        (line for line in _SEPARATORS if not any(line in text for text in examples)), None
    )
    if separator is None:
        raise DataError(
            "the approved prompts contain every separator of a list of prompts",
            expected=f"one of {' '.join(_SEPARATORS)} that occurs in no prompt",
            do="remove these lines from the approved prompts",
        )
    between, end = f"\n\n{separator}\n\n", f"\n\n{separator}\n"
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
    settings = GenerationConfig(
        do_sample=True,
        top_p=0.95,
        top_k=0,
        max_new_tokens=new_tokens,
        pad_token_id=_pad(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
    )
    size = _BATCH if cache_support(base.model).batched else 1
    order = random.Random(seed)
    for number in range(_ROUNDS):
        lists = [
            order.sample(examples, min(_EXAMPLES_SHOWN, fitting, len(examples)))
            for _ in range(_BATCH)
        ]
        rows = tokenizer([between.join([*texts, ""]) for texts in lists])["input_ids"]
        with torch.random.fork_rng():
            torch.manual_seed(seed * _ROUNDS + number)
            continued = in_batches(
                rows,
                lambda batch: _continued(base, batch, settings),
                size=size,
                describe=lambda row: f"a list of approved prompts, {len(row)} tokens",
            )
        yield [
            text.partition(end)[0].strip("\n")
            for text in continued
            if end in text and text.partition(end)[0].strip()
        ]


def _continued(
    base: LoadedBase, rows: Sequence[list[int]], settings: GenerationConfig
) -> list[str]:
    """Return the continuation that the base samples for each row of token ids."""
    device = next(base.model.parameters()).device
    width, pad = max(map(len, rows)), _pad(base.tokenizer)
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    with torch.no_grad():
        out = base.model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=settings,
        )
    return list(base.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True))


def _pad(tokenizer: Any) -> int:
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


def _last_text(example: Example) -> str:
    return example.prompt if example.messages is None else example.messages[-2].content


def _with_text(shape: Example, text: str, name: str) -> Example:
    """Return a prompt with the text in the place of the example's last message."""
    if shape.messages is None:
        return Example(name, text, NO_ANSWER)
    before = [turn for turn in shape.messages[:-2] if turn.role == "system"]
    turns = (*before, ChatMessage("user", text), ChatMessage("assistant", NO_ANSWER))
    return replace(shape, id=name, messages=turns, place="")
