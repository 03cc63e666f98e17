"""Decode one batch of answers, with drafts and a shared key-value cache.

Each forward pass processes the tokens that are certain and, after them, proposed tokens from the
drafts. Each row keeps the proposed tokens that equal those that decoding chooses, and one generated
token; the others are removed from the cache. With empty drafts this is plain decoding. A token is a
function of its logits, also where it is sampled (`trans_peft.validation.decoding.sampling`).

A pass over two rows takes nearly as long as one over twenty. So answers that last longer than most
of their batch are postponed and continued together with those of other batches.

Nothing is proposed if tokens cannot be removed from the cache, as with linear attention or after a
sliding window has moved (`trans_peft.validation.decoding.prefixes`).
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from trans_peft.errors import EvaluationError
from trans_peft.ports import Sampling
from trans_peft.validation.decoding.drafts import (
    PASS_OVERHEAD_TOKENS,
    Draft,
    DraftAcceptance,
    common_length,
)
from trans_peft.validation.decoding.next_tokens import NextTokens
from trans_peft.validation.decoding.prefixes import (
    PrefixReader,
    PromptPart,
    supports_truncation,
    truncate_cache,
)
from trans_peft.validation.decoding.sampling import Choice, chosen_greedily, sampled

__all__ = ["Decoder", "DecodingRow"]

_MAX_LOGITS = 2**27  # of one forward pass over drafts: half a gigabyte in fp32


@dataclass
class DecodingRow:
    """One answer that is being decoded.

    Attributes:
        prompt: token ids of the prompt.
        expected: token ids of the expected answer, from which the draft is made.
        adapter: name of the adapter that answers, for a model with several.
        key: key of the random numbers of the answer; 0 where decoding is greedy.
        cached: how many tokens of prompt and answer are in the cache.
        answer: the tokens generated so far.
        is_over: whether the answer has ended.
        next_tokens: the distributions from which the tokens of the answer were chosen, one part per
            pass; empty unless the decoder keeps them.
    """

    prompt: Sequence[int]
    expected: Sequence[int] = ()
    adapter: str | None = None
    key: int = 0
    draft: Draft | None = None
    cached: int = 0
    answer: list[int] = field(default_factory=list)
    is_over: bool = False
    near_ties: int = 0
    drafted: int = 0
    accepted: int = 0
    next_tokens: list[NextTokens] = field(default_factory=list)

    @property
    def text(self) -> list[int]:
        """Token ids of the prompt and of the answer so far."""
        return [*self.prompt, *self.answer]

    @property
    def unread(self) -> Sequence[int]:
        """Tokens of `text` that are not in the cache yet."""
        behind = self.cached - len(self.prompt)
        return self.answer[behind:] if behind >= 0 else self.text[self.cached :]

    def reset(self) -> None:
        """Discard the answer and the draft."""
        self.draft, self.cached, self.answer, self.is_over = None, 0, [], False
        self.near_ties = self.drafted = self.accepted = 0
        self.next_tokens = []


class Decoder:
    """Decodes the batches of one suite, and adapts proposals to how earlier drafts agreed."""

    def __init__(
        self,
        reader: PrefixReader,
        is_over: Callable[[list[int]], bool],
        *,
        sampling: Sampling | None = None,
        top: int = 0,
    ) -> None:
        """`is_over` returns whether an answer ends with its last token.

        Tokens are chosen by `sampling` and the keys of the rows, by default greedily. The
        distributions of the `top` most likely tokens are kept at each token of an answer.
        """
        self._reader, self._is_over, self._top = reader, is_over, top
        self._sampling = sampling
        self._acceptance = DraftAcceptance()
        # Both are set after the first forward pass.
        self._truncatable_columns, self._vocabulary = sys.maxsize, 1
        self._passes = 0  # of the last batch

    def answer(self, batch: Sequence[DecodingRow], *, may_postpone: bool = False) -> None:
        """Continue the answers of a batch until they are over.

        With `may_postpone`, stop when so few are left that processing their texts again later,
        together with others, is faster. Raises EvaluationError if logits are not finite.
        """
        # Rows of one adapter side by side, so that a layer takes them as one slice.
        rows = sorted((row for row in batch if not row.is_over), key=lambda row: row.adapter or "")
        cache, columns, cached = self._reader.begin(
            [row.text for row in rows], [row.adapter for row in rows]
        )
        first = self._acceptance.first(len(rows))
        for row, row_cached in zip(rows, cached, strict=True):
            row.cached = row_cached
            row.draft = row.draft or Draft(row.expected, first)
        unfinished, self._passes = rows, 0
        while unfinished and not (may_postpone and _is_worth_postponing(unfinished, len(rows))):
            self._passes += 1
            proposals = self._proposals(
                unfinished, columns + max(len(row.unread) for row in unfinished)
            )
            parts = [
                PromptPart(row.cached, row.unread, proposal, row.adapter)
                for row, proposal in zip(unfinished, proposals, strict=True)
            ]
            longest = max(map(len, proposals))
            out = self._reader.read(parts, cache, columns)
            columns += max(len(part.certain) for part in parts) + longest
            cache = out.past_key_values
            self._truncatable_columns = supports_truncation(cache)
            self._vocabulary = out.logits.shape[-1]
            agreed = self._accept(unfinished, proposals, out.logits[:, -longest - 1 :])
            keep = [i for i, row in enumerate(unfinished) if not row.is_over]
            surplus = [longest - agreed[i] for i in keep]
            if any(surplus) and columns > self._truncatable_columns:
                # Happens after the first pass only, which proposes without knowing the cache.
                for row in rows:
                    row.reset()
                return self.answer(rows, may_postpone=may_postpone)
            if 0 < len(keep) < len(unfinished):
                cache.reorder_cache(torch.tensor(keep, device=self._reader.device))
            if any(surplus):
                columns -= truncate_cache(cache, surplus)
            unfinished = [unfinished[i] for i in keep]
        self._acceptance.record(row.draft for row in rows if row.is_over and row.draft)

    def keep_together(self, batch: Sequence[DecodingRow]) -> int:
        """Return how many rows at the start of a batch, sorted longest first, to answer together.

        The shorter rows form a batch of their own if their padding would cost more than separate
        passes. The number of passes is estimated by that of the previous batch, or for the first
        batch by the expected tokens. On a GPU all rows stay together, because a pass costs far
        more than `PASS_OVERHEAD_TOKENS` there.
        """
        if self._reader.device.type != "cpu":
            return len(batch)
        lengths = [len(row.text) for row in batch]
        passes = self._passes or max(len(row.expected) for row in batch) or math.inf

        def saved_tokens(rows: int) -> float:
            shorter = lengths[rows:]
            return (
                len(shorter) * (lengths[0] - shorter[0]) - PASS_OVERHEAD_TOKENS * passes
                if shorter
                else 0
            )

        return max(range(len(batch), 0, -1), key=saved_tokens)

    def _proposals(self, rows: Sequence[DecodingRow], columns: int) -> list[list[int]]:
        """Return the tokens to check after the unread ones, which end in column `columns`.

        A row without a draft has no proposal.
        """
        proposals = [row.draft.proposal() if row.draft else [] for row in rows]
        most = min(
            common_length(
                [len(proposal) for proposal in proposals],
                unread=sum(len(row.unread) for row in rows),
            ),
            max(0, self._truncatable_columns - columns),
            _MAX_LOGITS // (self._vocabulary * len(rows)),
        )
        return [proposal[:most] for proposal in proposals]

    def _accept(
        self, rows: Sequence[DecodingRow], proposals: Sequence[Sequence[int]], logits: torch.Tensor
    ) -> list[int]:
        """Append the generated tokens to each answer; return how many proposed tokens were right.

        `logits` has the shape (rows, longest proposal + 1, vocabulary) and begins at the last
        unread token. Raises EvaluationError if they are not finite.
        """
        best, tokens, near = self._chosen(rows, logits)
        confirmed = []
        for i, (row, proposal, *columns) in enumerate(
            zip(rows, proposals, best.tolist(), tokens.tolist(), near.tolist(), strict=True)
        ):
            unread, start = len(row.unread), len(row.answer)
            for value, token, tie in zip(*columns, strict=True):
                if not math.isfinite(value):
                    raise EvaluationError(
                        "the model's logits are not finite",
                        found=f"{value} as the best logit of an answer's token "
                        f"{len(row.answer) + 1}",
                        do="check the weights of base and adapter, and whether the dtype overflows",
                    )
                row.answer.append(token)
                row.near_ties += tie
                agreed = len(row.answer) - start - 1
                row.is_over = self._is_over(row.answer)
                if proposal[agreed : agreed + 1] != [token] or row.is_over:
                    break
            if self._top:
                row.next_tokens.append(
                    NextTokens.of(logits[i, : len(row.answer) - start], self._top).cpu()
                )
            if row.draft:
                row.draft.observe(row.answer[start:])
            row.cached += unread + agreed
            row.drafted += len(proposal)
            row.accepted += agreed
            confirmed.append(agreed)
        return confirmed

    def _chosen(self, rows: Sequence[DecodingRow], logits: torch.Tensor) -> Choice:
        if self._sampling is None:
            return chosen_greedily(logits)
        return sampled(
            logits,
            [row.key for row in rows],
            [len(row.answer) for row in rows],
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
        )


def _is_worth_postponing(unfinished: Sequence[DecodingRow], rows: int) -> bool:
    """Whether processing texts again later costs less than passes over the remaining rows alone.

    The number of remaining passes is unknown. The estimate is the number of tokens by which an
    answer exceeds the expected one. The saved overhead is proportional to the empty part of the
    batch.
    """
    again = sum(len(row.prompt) + len(row.answer) for row in unfinished)
    passes = max(len(row.answer) - len(row.expected) for row in unfinished)
    return again < PASS_OVERHEAD_TOKENS * passes * (1 - len(unfinished) / rows)
