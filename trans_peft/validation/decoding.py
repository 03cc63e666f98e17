"""One batch of answers, token by token or draft by draft, from one key-value cache.

A forward pass reads what is known and, after it, what is expected. Of its tokens each row keeps
those that greedy decoding would have said, and one more that the model says itself; the rest is
taken back out of the cache. With empty drafts this is plain decoding: there is one loop.

Where a cache cannot be taken back, as in linear attention or behind a sliding window that has moved
on, nothing is proposed (`trans_peft.validation.reading`).
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from trans_peft.errors import EvaluationError
from trans_peft.validation.drafting import Draft, Trust, common_length
from trans_peft.validation.reading import Part, Reader, erasable, take_back

__all__ = ["NEAR_TIE", "Decoder", "Row"]

NEAR_TIE = 1e-4
"""Two best logits this close may change places with the shape of the batch they come from."""

_MOST_LOGITS = 2**27  # of one forward pass over drafts: half a gigabyte in fp32


@dataclass
class Row:
    """One answer in the making. Of prompt and answer the cache holds `cached` tokens."""

    prompt: Sequence[int]
    draft: Draft
    cached: int = 0
    answer: list[int] = field(default_factory=list)
    near_ties: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def unread(self) -> Sequence[int]:
        """The tokens that are certain and not yet in the cache."""
        return self.answer[-1:] or self.prompt[self.cached :]


class Decoder:
    """Answers batches of one suite; what one teaches about model and drafts serves the next."""

    def __init__(self, reader: Reader, over: Callable[[list[int]], bool]) -> None:
        """`over` says of an answer whether it ends with its last token."""
        self._reader, self._over = reader, over
        self._trust = Trust()
        # Both are known from the first forward pass on.
        self._erasable, self._vocabulary = sys.maxsize, 1

    def answer(self, batch: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Row]:
        """Answer pairs of prompt and draft (token ids). EvaluationError: logits not finite."""
        first = self._trust.first(len(batch))
        cache, columns, cached = self._reader.begin([prompt for prompt, _ in batch])
        rows = [
            Row(prompt, Draft(draft, first), there)
            for (prompt, draft), there in zip(batch, cached, strict=True)
        ]
        going = rows
        while going:
            proposals = self._proposals(going, columns + max(len(row.unread) for row in going))
            parts = [
                Part(row.cached, row.unread, proposal)
                for row, proposal in zip(going, proposals, strict=True)
            ]
            longest = max(map(len, proposals))
            out = self._reader.read(parts, cache, columns)
            columns += max(len(part.certain) for part in parts) + longest
            cache = out.past_key_values
            self._erasable, self._vocabulary = erasable(cache), out.logits.shape[-1]
            agreed = self._accept(going, proposals, out.logits[:, -longest - 1 :])
            keep = [i for i, row in enumerate(going) if not self._over(row.answer)]
            surplus = [longest - agreed[i] for i in keep]
            if any(surplus) and columns > self._erasable:
                # Only the first forward pass can be wrong about what may be taken back.
                return self.answer(batch)
            if 0 < len(keep) < len(going):
                cache.reorder_cache(torch.tensor(keep, device=self._reader.device))
            if any(surplus):
                columns -= take_back(cache, surplus)
            going = [going[i] for i in keep]
        self._trust.learn(row.draft for row in rows)
        return rows

    def _proposals(self, rows: Sequence[Row], columns: int) -> list[list[int]]:
        """Return the tokens to check after the unread ones, which end in column `columns`."""
        proposals = [row.draft.proposal() for row in rows]
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
        self, rows: Sequence[Row], proposals: Sequence[Sequence[int]], logits: torch.Tensor
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
                if proposal[agreed : agreed + 1] != [token] or self._over(row.answer):
                    break
            row.draft.observe(row.answer[said:])
            row.cached += unread + agreed
            row.drafted += len(proposal)
            row.accepted += agreed
            confirmed.append(agreed)
        return confirmed
