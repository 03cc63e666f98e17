"""Decoding with a loaded causal language model, in batches and with drafts.

The tokens are those of transformers' `generate(do_sample=False)` on one prompt at a time, in fp32.
If the two best logits differ by less than 1e-4, either token may be chosen. With `sampling`, tokens
have the probabilities of `generate(do_sample=True)`, and depend on the key of the answer.

Decoding is faster because prompts of similar length share a batch, a common prefix of all prompts
is processed once, logits are computed only where they are needed, finished answers leave their
batch, and an expected answer is checked in one forward pass. Of the model's generation config only
the end tokens are used.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trans_peft.errors import InvalidSpecError
from trans_peft.ports import Sampling
from trans_peft.text.answers import answer_text, decode_ids
from trans_peft.validation.decoding.batching import Progress, evaluating, in_batches
from trans_peft.validation.decoding.cache_support import cache_support
from trans_peft.validation.decoding.decoder import Decoder, DecodingRow
from trans_peft.validation.decoding.next_tokens import NextTokens
from trans_peft.validation.decoding.prefixes import PrefixReader, check_adapter

__all__ = ["AnswerEnds", "Answers", "evaluating", "generate"]

_EXTRA_TOKENS = 4  # that a stop string may span in addition to one for each of its bytes


@dataclass(frozen=True)
class Answers:
    """Generated answers, in the order of the prompts.

    Attributes:
        texts: the text before the end token or the first stop string, with special tokens.
        ids: the generated tokens, including the one that ended the answer.
        near_ties_of: for each answer, the number of tokens that would be others if logits changed
            by 1e-4.
        drafted: proposed tokens that were checked.
        accepted: proposed tokens that decoding confirmed.
        next_tokens: for each answer the distributions from which its tokens were chosen; empty
            unless `generate` got `top`.
    """

    texts: list[str]
    ids: list[list[int]]
    near_ties_of: list[int]
    drafted: int = 0
    accepted: int = 0
    next_tokens: list[NextTokens] = field(default_factory=list)

    @property
    def near_ties(self) -> int:
        """The near ties of all answers."""
        return sum(self.near_ties_of)


def generate(  # noqa: PLR0913  named as in transformers
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    end_tokens: Collection[int] = (),
    drafts: Sequence[Sequence[int]] | None = None,
    adapters: Sequence[str | None] | None = None,
    sampling: Sampling | None = None,
    batch_size: int | None = None,
    top: int = 0,
    on_progress: Progress | None = None,
) -> Answers:
    """Continue each prompt by greedy decoding, or by sampling.

    An answer ends with an end token (the model's, the tokenizer's, or one of `end_tokens`), with
    the token that completes one of the `stop` strings, or after `max_new_tokens` tokens.

    Args:
        prompts: token ids without padding.
        drafts: expected token ids of each answer. Correct ones save time; none changes an answer.
        adapters: names of each prompt's adapter, for a model with several
            (`trans_peft.transfer.mixed_adapters`). None in the list: the bare base.
        sampling: how tokens are sampled, with a key for each prompt. None: greedy decoding.
        batch_size: prompts in a batch, by default 32; halved when memory runs out.
        top: number of most likely tokens in the distributions that are returned. 0: none.
        on_progress: called with the finished answers and the total.

    The model's training modes are restored. Raises EvaluationError if logits are not finite or a
    single prompt does not fit into memory; InvalidSpecError for empty prompts, empty stop strings,
    `max_new_tokens` below 1 and a wrong number of drafts or keys; UnsupportedModelError for
    adapters that add virtual tokens (prompt tuning, prefix tuning).
    """
    _check(model, prompts, max_new_tokens, stop)
    _check_counts(len(prompts), drafts=drafts, keys=sampling and sampling.keys)
    ends = AnswerEnds(model, tokenizer, stop, end_tokens)
    drafts = [ends.before(d, max_new_tokens) for d in drafts or [()] * len(prompts)]
    names = [None] * len(prompts) if adapters is None else adapters
    keys = [0] * len(prompts) if sampling is None else sampling.keys
    rows = [DecodingRow(*parts) for parts in zip(prompts, drafts, names, keys, strict=True)]

    def report_progress(*_: int) -> None:
        if on_progress is not None:
            on_progress(sum(row.is_over for row in rows), len(rows))

    with evaluating(model), torch.no_grad():
        reader = PrefixReader(model, cache_support(model), prompts, adapters)
        if not reader.support.batched:
            batch_size = 1
        decoder = Decoder(
            reader,
            lambda answer: len(answer) == max_new_tokens or ends.reached(answer),
            sampling=sampling,
            top=top,
        )
        while waiting := [row for row in rows if not row.is_over]:
            # The longest first, so that a lack of memory shows early.
            waiting.sort(key=lambda row: -len(row.text) - len(row.expected))

            def answer(
                batch: Sequence[DecodingRow], total: int = len(waiting)
            ) -> Sequence[DecodingRow]:
                decoder.answer(batch, may_postpone=len(batch) < total)
                return batch

            in_batches(
                waiting,
                answer,
                size=batch_size,
                describe=lambda row: f"a prompt of {len(row.prompt)} tokens",
                keep_together=decoder.keep_together,
                on_progress=report_progress,
            )
    ids = [row.answer for row in rows]
    return Answers(
        texts=[ends.text(answer) for answer in ids],
        ids=ids,
        near_ties_of=[row.near_ties for row in rows],
        drafted=sum(row.drafted for row in rows),
        accepted=sum(row.accepted for row in rows),
        next_tokens=[NextTokens.joined(row.next_tokens) for row in rows] if top else [],
    )


def _check(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[str],
) -> None:
    check_adapter(model)
    empty = [i for i, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise InvalidSpecError("prompts have no tokens", found=f"positions {empty[:10]}")
    if not all(stop):
        raise InvalidSpecError("a stop string is empty", found=list(stop))
    if max_new_tokens < 1:
        raise InvalidSpecError("max_new_tokens must be at least 1", found=max_new_tokens)


def _check_counts(prompts: int, **given: Sequence[Any] | None) -> None:
    for what, values in given.items():
        if values is not None and len(values) != prompts:
            raise InvalidSpecError(
                f"the number of {what} is not the number of prompts",
                expected=f"{prompts} {what}",
                found=len(values),
            )


class AnswerEnds:
    """Finds the end of an answer: end tokens and stop strings.

    `tokens` are the end tokens: those of the model and the tokenizer, `end_tokens`, and the stop
    strings that are tokens.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, stop: Sequence[str], end_tokens: Collection[int]
    ) -> None:
        """`stop` and `end_tokens` are those of `generate`."""
        added = tokenizer.get_added_vocab()
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        own = own if isinstance(own, list) else [own]
        stops = (added[text] for text in stop if text in added)
        ids = {*own, tokenizer.eos_token_id, *end_tokens, *stops}
        self.tokens = frozenset(ids - {None})
        self._strings = [text for text in stop if text not in added]
        self._tail = max((len(text.encode()) for text in self._strings), default=0) + _EXTRA_TOKENS
        self._tokenizer = tokenizer

    def reached(self, answer: Sequence[int]) -> bool:
        """Whether an answer ends with its last token."""
        if answer[-1] in self.tokens:
            return True
        if not self._strings:
            return False
        tail = decode_ids(self._tokenizer, answer[-self._tail :])
        return any(text in tail for text in self._strings)

    def before(self, draft: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return a draft without the token that ends the answer, and what follows it.

        Checking that token saves no pass, because every pass also generates one token.
        """
        draft = list(draft[: max_new_tokens - 1])
        over = (i for i in range(len(draft)) if self.reached(draft[: i + 1]))
        return draft[: next(over, None)]

    def text(self, answer: list[int]) -> str:
        """Return the text before the end token or the first stop string."""
        text = answer_text(self._tokenizer, answer, self.tokens)
        return text[: min((at for s in self._strings if (at := text.find(s)) >= 0), default=None)]
