"""Prompts for the recovery strategy `distilled`, from a file or written by the base itself.

No training row is read. Prompts that a suite asks, exactly or nearly, are left out, so that the
gate measures on prompts that the distillation has not seen.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trans_peft.data import ChatMessage, Example, read_examples, read_prompts
from trans_peft.data.overlap import distinct_from
from trans_peft.data.rows import NO_ANSWER
from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.data import DataSource
from trans_peft.domain.recovery import MIN_PROMPTS, DistillationPolicy
from trans_peft.errors import DataError
from trans_peft.lifecycle.base_files import base_folder
from trans_peft.ports import Platform

if TYPE_CHECKING:
    from trans_peft.models import LoadedBase

__all__ = ["Prompts", "like_examples", "prompts_for", "text_of"]

_SEPARATOR = "\n\n###\n\n"
_EXAMPLES_SHOWN = 8  # in one pass of the base, in random order
_ROUNDS = 12
_BATCH = 32
_LENGTH_FACTOR = 1.5  # tokens of a written prompt, relative to the longest example


@dataclass(frozen=True)
class Prompts:
    """Distinct prompts, and where they come from."""

    examples: tuple[Example, ...]
    note: str


def prompts_for(
    source: AdapterVersion, base: BaseVersion, policy: DistillationPolicy, platform: Platform
) -> Prompts:
    """Return at most `policy.prompts` prompts for an adapter.

    Raises DataError if there are fewer than `MIN_PROMPTS` distinct ones, or no source; and what
    `read_prompts` raises.
    """
    items = [
        text_of(example)
        for suite in source.suites
        for example in read_examples(suite.data, platform.store, limit=suite.limit)
    ]
    if policy.prompts_uri:
        uri = policy.prompts_of(source.adapter)
        read, labeled = read_prompts(DataSource(uri), platform.store)
        shuffled = random.Random(0).sample(read, len(read))
        found = distinct_from(shuffled, items, text=text_of)[: policy.prompts]
        note = f"{len(found)} prompts of {uri}"
        if labeled:
            note += f", whose {labeled} answers were not used"
    else:
        approved = source.recipe.approved_prompts if source.recipe is not None else None
        if approved is None:
            raise DataError(
                f"there are no prompts for {source.adapter}",
                expected="prompts_uri in the policy, or approved_prompts in the recipe",
                do="name a file with recent prompts, or train with prompts that may be kept",
            )
        from trans_peft.models import load_base

        examples, _ = read_prompts(approved, platform.store)
        loaded = load_base(base_folder(base, platform), source.suites[0].dtype)
        found = like_examples(loaded, examples, items, policy.prompts)
        note = f"{len(found)} prompts written by {base} like {len(examples)} approved ones"
    if len(found) < MIN_PROMPTS:
        raise DataError(
            f"there are too few prompts for {source.adapter}",
            expected=f"at least {MIN_PROMPTS} that differ from each other and from the suites",
            found=note,
            do="add prompts of this adapter's task",
        )
    return Prompts(tuple(found), note)


def like_examples(
    base: "LoadedBase", examples: Sequence[Example], items: Sequence[str], count: int, seed: int = 0
) -> list[Example]:
    """Return up to `count` prompts that the base writes as continuations of a list of examples.

    Each is sampled (top-p 0.95) after some examples in random order, and ends at the separator. It
    differs from the examples, the items and earlier prompts. A chat example gives its last message.
    """
    shape = examples[0]
    found: list[Example] = []
    known = [*items, *map(text_of, examples)]
    for texts in _written(base, [_last_text(example) for example in examples], seed):
        written = [
            _with_text(shape, text, f"written-{len(found) + i}") for i, text in enumerate(texts)
        ]
        found = distinct_from([*found, *written], known, text=text_of)
        if len(found) >= count:
            break
    return found[:count]


def _written(base: "LoadedBase", examples: Sequence[str], seed: int) -> Iterator[list[str]]:
    """Yield a batch of written texts for each pass of the base."""
    import torch
    from transformers import GenerationConfig

    tokenizer: Any = base.tokenizer
    order = random.Random(seed)
    lengths = [len(ids) for ids in tokenizer(list(examples))["input_ids"]]
    separator = len(tokenizer(_SEPARATOR)["input_ids"])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    settings = GenerationConfig(
        do_sample=True,
        top_p=0.95,
        top_k=0,
        max_new_tokens=int(_LENGTH_FACTOR * max(lengths)) + separator,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    device = next(base.model.parameters()).device
    for number in range(_ROUNDS):
        shown = [order.sample(examples, min(_EXAMPLES_SHOWN, len(examples))) for _ in range(_BATCH)]
        rows = tokenizer([_SEPARATOR.join([*texts, ""]) for texts in shown])["input_ids"]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor(
            [[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device
        )
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed * _ROUNDS + number)
            out = base.model.generate(
                input_ids=ids, attention_mask=mask, generation_config=settings
            )
        texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        yield [
            written
            for text in texts
            if _SEPARATOR.strip() in text
            and (written := text.split(_SEPARATOR.rstrip("\n"))[0].strip("\n"))
        ]


def text_of(example: Example) -> str:
    """Return the text of a prompt, without the answer."""
    if example.messages is None:
        return example.prompt
    return "\n".join(turn.content for turn in example.messages[:-1])


def _last_text(example: Example) -> str:
    return example.prompt if example.messages is None else example.messages[-2].content


def _with_text(shape: Example, text: str, name: str) -> Example:
    """Return a prompt with the text in the place of the example's last message."""
    if shape.messages is None:
        return Example(name, text, NO_ANSWER)
    before = [turn for turn in shape.messages[:-2] if turn.role == "system"]
    turns = (*before, ChatMessage("user", text), ChatMessage("assistant", NO_ANSWER))
    return replace(shape, id=name, messages=turns, place="")
