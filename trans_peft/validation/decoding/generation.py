"""Greedy answers from a causal language model that is already loaded, in batches, with drafts.

The same tokens as transformers' `generate(do_sample=False)` gives prompt by prompt (in fp32; where
the two best logits lie within 1e-4, either may come first). What differs is the cost: prompts
of like length share a batch, what all of them begin with is read once, logits are computed only
where they are needed, a finished answer leaves its batch at once, and an answer that was expected
is checked in one forward pass. Nothing of the model's own generation config counts but its end
tokens.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trans_peft.errors import InvalidSpecError
from trans_peft.text.answers import answer_text, spoken
from trans_peft.validation.decoding.batching import Progress, evaluating, in_batches
from trans_peft.validation.decoding.decoder import Decoder, DecodingRow
from trans_peft.validation.decoding.prefixes import PrefixReader, check_adapter

__all__ = ["Answers", "evaluating", "generate"]

_SLACK = 4  # tokens that a stop string may need beyond one for each of its bytes


@dataclass(frozen=True)
class Answers:
    """What was answered, in the prompts' order.

    `ids` are the new tokens, with the one that ended the answer; `texts` are cut before the end
    token or the first stop string, and keep the special tokens before it.
    `near_ties` counts the tokens of all answers that might as well
    have been others; `accepted` of the `drafted` tokens were what the model says.
    """

    texts: list[str]
    ids: list[list[int]]
    near_ties: int = 0
    drafted: int = 0
    accepted: int = 0


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    end_tokens: Collection[int] = (),
    drafts: Sequence[Sequence[int]] | None = None,
    batch_size: int | None = None,
    on_progress: Progress | None = None,
) -> Answers:
    """Return what greedy decoding adds to each prompt.

    `prompts` are token ids, not padded. An answer ends with an end token (the model's, the
    tokenizer's, or one of `end_tokens`), with the token that completes one of the `stop` strings,
    or after `max_new_tokens`. `drafts` are the token ids that each answer is expected to have, as
    far as known: right ones save time, no draft changes an answer. A batch that does not fit into
    memory is halved and tried again. The model is left as it was found. Raises EvaluationError
    where logits are not finite or one prompt alone does not fit, InvalidSpecError for prompts
    without tokens, no tokens to answer with, and more or fewer drafts than prompts,
    UnsupportedModelError for an adapter that adds tokens of its own (prompt tuning, prefix tuning).
    """
    _check(model, prompts, max_new_tokens, drafts)
    ends = _Ends(model, tokenizer, stop, end_tokens)
    drafts = [ends.before(d, max_new_tokens) for d in drafts or [()] * len(prompts)]
    rows = [DecodingRow(prompt, draft) for prompt, draft in zip(prompts, drafts, strict=True)]

    def told(*_: int) -> None:
        if on_progress is not None:
            on_progress(sum(row.is_over for row in rows), len(rows))

    with evaluating(model), torch.no_grad():
        decoder = Decoder(
            PrefixReader(model, prompts),
            lambda answer: len(answer) == max_new_tokens or ends.reached(answer),
        )
        while waiting := [row for row in rows if not row.is_over]:
            # The longest first: what does not fit shows at once.
            waiting.sort(key=lambda row: -len(row.text) - len(row.expected))

            def answer(
                batch: Sequence[DecodingRow], there: int = len(waiting)
            ) -> Sequence[DecodingRow]:
                decoder.answer(batch, aside=len(batch) < there)
                return batch

            in_batches(
                waiting,
                answer,
                size=batch_size,
                told_as=lambda row: f"a prompt of {len(row.prompt)} tokens",
                together=decoder.together,
                on_progress=told,
            )
    ids = [row.answer for row in rows]
    return Answers(
        texts=[ends.text(answer) for answer in ids],
        ids=ids,
        near_ties=sum(row.near_ties for row in rows),
        drafted=sum(row.drafted for row in rows),
        accepted=sum(row.accepted for row in rows),
    )


def _check(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    drafts: Sequence[Sequence[int]] | None,
) -> None:
    check_adapter(model)
    empty = [i for i, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise InvalidSpecError("prompts without a single token", found=f"positions {empty[:10]}")
    if max_new_tokens < 1:
        raise InvalidSpecError("an answer has at least one token", found=max_new_tokens)
    if drafts is not None and len(drafts) != len(prompts):
        raise InvalidSpecError(
            "every prompt has its draft, an empty one where nothing is expected",
            expected=f"{len(prompts)} drafts",
            found=len(drafts),
        )


class _Ends:
    """Knows when an answer has ended, and which text it is."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, stop: Sequence[str], end_tokens: Collection[int]
    ) -> None:
        added = tokenizer.get_added_vocab()
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        own = own if isinstance(own, list) else [own]
        stops = (added[text] for text in stop if text in added)
        ids = {*own, tokenizer.eos_token_id, *end_tokens, *stops}
        self.tokens = frozenset(ids - {None})
        self._strings = [text for text in stop if text not in added]
        self._tail = max((len(text.encode()) for text in self._strings), default=0) + _SLACK
        self._tokenizer = tokenizer

    def reached(self, answer: Sequence[int]) -> bool:
        if answer[-1] in self.tokens:
            return True
        if not self._strings:
            return False
        tail = spoken(self._tokenizer, answer[-self._tail :])
        return any(text in tail for text in self._strings)

    def before(self, draft: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the part of a draft that is worth checking: a last token follows from the rest."""
        draft = list(draft[: max_new_tokens - 1])
        over = (i for i in range(len(draft)) if self.reached(draft[: i + 1]))
        return draft[: next(over, None)]

    def text(self, answer: list[int]) -> str:
        text = answer_text(self._tokenizer, answer, self.tokens)
        return text[: min((at for s in self._strings if (at := text.find(s)) >= 0), default=None)]
