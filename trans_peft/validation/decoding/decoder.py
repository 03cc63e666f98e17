"""One batch of answers, token by token or draft by draft, from one key-value cache.

A forward pass reads what is known and, after it, what is expected. Of its tokens each row keeps
those that greedy decoding would have said, and one more that the model says itself; the rest is
taken back out of the cache. With empty drafts this is plain decoding: there is one loop.

Answers that outlast most of their batch are set aside and go on together with those of others: a
pass over two of them takes nearly as long as one over twenty.

Where a cache cannot be taken back, as in linear attention or behind a sliding window that has moved
on, nothing is proposed (`trans_peft.validation.decoding.prefixes`).
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from trans_peft.errors import EvaluationError
from trans_peft.validation.decoding.drafts import PASS, Draft, DraftAcceptance, common_length
from trans_peft.validation.decoding.prefixes import (
    PrefixReader,
    PromptPart,
    supports_truncation,
    truncate_cache,
)

__all__ = ["NEAR_TIE", "Decoder", "DecodingRow"]

NEAR_TIE = 1e-4
"""Two best logits this close may change places with the shape of the batch they come from."""

_MOST_LOGITS = 2**27  # of one forward pass over drafts: half a gigabyte in fp32


@dataclass
class DecodingRow:
    """One answer in the making. Of prompt and answer the cache holds `cached` tokens."""

    prompt: Sequence[int]
    expected: Sequence[int] = ()
    draft: Draft | None = None
    cached: int = 0
    answer: list[int] = field(default_factory=list)
    is_over: bool = False
    near_ties: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def text(self) -> list[int]:
        """Prompt and answer so far."""
        return [*self.prompt, *self.answer]

    @property
    def unread(self) -> Sequence[int]:
        """The tokens that are certain and not yet in the cache."""
        behind = self.cached - len(self.prompt)
        return self.answer[behind:] if behind >= 0 else self.text[self.cached :]

    def begin_again(self) -> None:
        """Forget everything but the question."""
        self.draft, self.cached, self.answer, self.is_over = None, 0, [], False
        self.near_ties = self.drafted = self.accepted = 0


class Decoder:
    """Answers batches of one suite; what one teaches about model and drafts serves the next."""

    def __init__(self, reader: PrefixReader, over: Callable[[list[int]], bool]) -> None:
        """`over` says of an answer whether it ends with its last token."""
        self._reader, self._over = reader, over
        self._trust = DraftAcceptance()
        # Both are known from the first forward pass on.
        self._erasable, self._vocabulary = sys.maxsize, 1
        self._passes = 0  # of the last batch

    def answer(self, batch: Sequence[DecodingRow], *, aside: bool = False) -> None:
        """Go on with answers until all are over. EvaluationError: logits not finite.

        With `aside`, it stops when so few are left that they are read again, later and together
        with others, sooner than they are waited for.
        """
        rows = [row for row in batch if not row.is_over]
        cache, columns, cached = self._reader.begin([row.text for row in rows])
        first = self._trust.first(len(rows))
        for row, there in zip(rows, cached, strict=True):
            row.cached = there
            row.draft = row.draft or Draft(row.expected, first)
        going, self._passes = rows, 0
        while going and not (aside and _better_later(going, len(rows))):
            self._passes += 1
            proposals = self._proposals(going, columns + max(len(row.unread) for row in going))
            parts = [
                PromptPart(row.cached, row.unread, proposal)
                for row, proposal in zip(going, proposals, strict=True)
            ]
            longest = max(map(len, proposals))
            out = self._reader.read(parts, cache, columns)
            columns += max(len(part.certain) for part in parts) + longest
            cache = out.past_key_values
            self._erasable, self._vocabulary = supports_truncation(cache), out.logits.shape[-1]
            agreed = self._accept(going, proposals, out.logits[:, -longest - 1 :])
            keep = [i for i, row in enumerate(going) if not row.is_over]
            surplus = [longest - agreed[i] for i in keep]
            if any(surplus) and columns > self._erasable:
                # Only the first forward pass can be wrong about what may be taken back.
                for row in rows:
                    row.begin_again()
                return self.answer(rows, aside=aside)
            if 0 < len(keep) < len(going):
                cache.reorder_cache(torch.tensor(keep, device=self._reader.device))
            if any(surplus):
                columns -= truncate_cache(cache, surplus)
            going = [going[i] for i in keep]
        self._trust.learn(row.draft for row in rows if row.is_over and row.draft)

    def together(self, batch: Sequence[DecodingRow]) -> int:
        """Return how many of these rows, the longest first, to answer without those behind them.

        All, unless the others would read more padding than passes of their own cost: as many as the
        batch before took, or at first as there are tokens expected. Only on a CPU: on a GPU a pass
        costs far more tokens than `PASS`.
        """
        if self._reader.device.type != "cpu":
            return len(batch)
        lengths = [len(row.text) for row in batch]
        passes = self._passes or max(len(row.expected) for row in batch) or math.inf

        def spared(rows: int) -> float:
            shorter = lengths[rows:]
            return len(shorter) * (lengths[0] - shorter[0]) - PASS * passes if shorter else 0

        return max(range(len(batch), 0, -1), key=spared)

    def _proposals(self, rows: Sequence[DecodingRow], columns: int) -> list[list[int]]:
        """Return the tokens to check after the unread ones, which end in column `columns`."""
        proposals = [row.draft.proposal() if row.draft else [] for row in rows]
        most = min(
            common_length(
                [len(proposal) for proposal in proposals],
                unread=sum(len(row.unread) for row in rows),
            ),
            max(0, self._erasable - columns),
            _MOST_LOGITS // (self._vocabulary * len(rows)),
        )
        return [proposal[:most] for proposal in proposals]

    def _accept(
        self, rows: Sequence[DecodingRow], proposals: Sequence[Sequence[int]], logits: torch.Tensor
    ) -> list[int]:
        """Add to each answer what the model says; return how many proposed tokens that confirms.

        `logits`: (rows, longest proposal + 1, vocabulary), from the last unread token on.
        """
        best, tokens = logits.max(-1)
        near = (logits >= best[..., None] - NEAR_TIE).sum(-1) > 1
        confirmed = []
        for row, proposal, *columns in zip(
            rows, proposals, best.tolist(), tokens.tolist(), near.tolist(), strict=True
        ):
            unread, said = len(row.unread), len(row.answer)
            for value, token, tie in zip(*columns, strict=True):
                if not math.isfinite(value):
                    raise EvaluationError(
                        "the model's logits are not finite",
                        found=f"{value} as the best logit of an answer's token "
                        f"{len(row.answer) + 1}",
                        do="look for broken weights (base and adapter) or a dtype that overflows",
                    )
                row.answer.append(token)
                row.near_ties += tie
                agreed = len(row.answer) - said - 1
                row.is_over = self._over(row.answer)
                if proposal[agreed : agreed + 1] != [token] or row.is_over:
                    break
            if row.draft:
                row.draft.observe(row.answer[said:])
            row.cached += unread + agreed
            row.drafted += len(proposal)
            row.accepted += agreed
            confirmed.append(agreed)
        return confirmed


def _better_later(going: Sequence[DecodingRow], rows: int) -> bool:
    """Whether reading texts again costs less than the passes that they would take by themselves.

    How many those are is a guess: as many as an answer has gone on behind what was expected of it.
    What a pass costs beside its tokens is saved as far as the batch is empty.
    """
    again = sum(len(row.prompt) + len(row.answer) for row in going)
    passes = max(len(row.answer) - len(row.expected) for row in going)
    return again < PASS * passes * (1 - len(going) / rows)
