"""One batch of answers, token by token or draft by draft, from one key-value cache.

A forward pass reads what is known and, after it, what is expected. Of its tokens each row keeps
those that greedy decoding would have said, and one more that the model says itself; the rest is
taken back out of the cache. With empty drafts this is plain decoding: there is one loop.

After each pass the cache is what plain decoding would have left: each text in one piece, ending in
the last column. So whatever looks at positions, distances or windows of columns is right (learned
positions, rotary ones, ALiBi, local attention), and nothing depends on the architecture but whether
a cache can be taken back at all. Where it cannot, as in linear attention or behind a sliding window
that has moved on, nothing is proposed.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from trans_peft.errors import EvaluationError
from trans_peft.validation.drafting import Draft, Trust, common_length

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
        return self.answer[-1:] or self.prompt


class Decoder:
    """Answers batches with one model; what one teaches about model and drafts serves the next."""

    def __init__(self, model: nn.Module, over: Callable[[list[int]], bool]) -> None:
        """`over` says of an answer whether it ends with its last token."""
        self._model, self._over = model, over
        self._device = next(model.parameters()).device
        self._trust = Trust()
        # Both are known from the first forward pass on.
        self._erasable, self._vocabulary = sys.maxsize, 1

    def answer(self, batch: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Row]:
        """Answer pairs of prompt and draft (token ids). EvaluationError: logits not finite."""
        first = self._trust.first(len(batch))
        rows = [Row(prompt, Draft(draft, first)) for prompt, draft in batch]
        going, cache, columns = rows, None, 0
        while going:
            columns += max(len(row.unread) for row in going)
            proposals = self._proposals(going, columns)
            longest = max(map(len, proposals))
            columns += longest
            out = self._forward(going, proposals, cache, columns)
            cache = out.past_key_values
            self._erasable, self._vocabulary = _erasable(cache), out.logits.shape[-1]
            agreed = self._accept(going, proposals, out.logits[:, -longest - 1 :])
            keep = [i for i, row in enumerate(going) if not self._over(row.answer)]
            surplus = [longest - agreed[i] for i in keep]
            if any(surplus) and columns > self._erasable:
                # Only the first forward pass can be wrong about what may be taken back.
                return self.answer(batch)
            if 0 < len(keep) < len(going):
                cache.reorder_cache(torch.tensor(keep, device=self._device))
            if any(surplus):
                columns -= _erase(cache, surplus)
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

    def _forward(
        self, rows: Sequence[Row], proposals: Sequence[Sequence[int]], cache: Any, columns: int
    ) -> Any:
        """Read unread and proposed tokens into `columns` columns in all; logits of the last ones.

        A row is padding, its text so far, its proposal, and padding up to the longest proposal. Any
        token will do for padding: before the text it is masked, behind it nothing looks at it.
        """
        before = max(len(row.unread) for row in rows)
        behind = max(map(len, proposals))
        ids, starts, ends = [], [], []
        for row, proposal in zip(rows, proposals, strict=True):
            left, right = before - len(row.unread), behind - len(proposal)
            ids.append([0] * left + [*row.unread, *proposal] + [0] * right)
            starts.append(row.cached - left)
            ends.append(row.cached + len(row.unread) + len(proposal) - 1)
        start, end = torch.tensor([starts, ends], device=self._device)[..., None]
        # What stands in a row's last columns is unmasked; its first column has this position.
        position = torch.arange(columns, device=self._device) + start - (columns - before - behind)
        return self._model(
            input_ids=torch.tensor(ids, device=self._device),
            attention_mask=(position >= 0).long(),
            position_ids=position[:, -before - behind :].clamp(min=0).minimum(end),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=behind + 1,
        )

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


def _erasable(cache: Any) -> int:
    """Return the largest width in columns of which the last ones can be taken back."""
    layers = getattr(cache, "layers", ())
    if not layers or {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer}:
        return 0  # states that run on know no way back
    windows = [layer.sliding_window for layer in layers if layer.is_sliding]
    return min(windows, default=sys.maxsize) - 1  # what has left a window is gone


def _erase(cache: Any, surplus: Sequence[int]) -> int:
    """Take so many last columns from each row; return by how many the cache is narrower now.

    A row that loses more than another moves to the right; what it loses stands to its left then,
    where the mask hides it.
    """
    least = min(surplus)
    cache.crop(-least)
    if max(surplus) > least:
        width = cache.layers[0].keys.shape[-2]
        moves = torch.tensor([count - least for count in surplus])[:, None]
        source = ((torch.arange(width) - moves) % width)[:, None, :, None]
        for layer in cache.layers:
            here = source.to(layer.keys.device)
            layer.keys = layer.keys.take_along_dim(here, dim=2)
            layer.values = layer.values.take_along_dim(here, dim=2)
    return least
