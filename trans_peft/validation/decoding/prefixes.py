"""What a model reads, several texts at once, into one key-value cache that they share.

After each pass the cache is what reading without any sharing would have left: each text in one
piece, ending in the last column. So whatever looks at positions, distances or windows of columns is
right (learned positions, rotary ones, ALiBi, local attention), and nothing depends on the
architecture but whether a cache can be taken back at all.

The beginning that all prompts of a suite have in common (few-shot examples, an instruction) is read
once for each adapter and lent to every batch. A prompt that is shorter than its neighbours reads
the end of that beginning once more, where it would otherwise read padding: no pass is wider for it,
and no column lies between a beginning and its text.
"""

import copy
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from trans_peft.errors import UnsupportedModelError
from trans_peft.validation.decoding.drafts import PASS

__all__ = [
    "PrefixReader",
    "PromptPart",
    "check_adapter",
    "last_columns",
    "supports_truncation",
    "truncate_cache",
]

_CHANGING_ROPES = ("dynamic", "longrope")
"""Rotary frequencies that depend on a text's length: a beginning is not the same by itself."""


class PromptPart(NamedTuple):
    """What one text reads in a pass: behind `cached` tokens, what is certain and what is not."""

    cached: int
    certain: Sequence[int]
    proposed: Sequence[int] = ()


class PrefixReader:
    """Reads texts with one model; begins them with what all its `prompts` begin with."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]] = ()) -> None:
        check_adapter(model)
        self._model = model
        self.device = next(model.parameters()).device
        self._beginning = _worth_sharing(model, prompts)
        self._read: Any = None

    def begin(self, prompts: Sequence[Sequence[int]]) -> tuple[Any, int, list[int]]:
        """Return a cache (None: empty), its columns, and how many of each prompt's tokens it has.

        What is left of each prompt, one token at least, fits into as many columns as the longest
        needs in any case.
        """
        if self._beginning and self._read is None:
            self._read = self.read([PromptPart(0, self._beginning)], None, 0).past_key_values
            if supports_truncation(self._read) < len(self._beginning):
                self._beginning = []  # it runs on, or a window has left its start behind
        shared = len(self._beginning)
        if not shared:
            return None, 0, [0] * len(prompts)
        most = max(map(len, prompts)) - shared
        moves = [min(most + shared - len(prompt), shared) for prompt in prompts]
        cache = copy.deepcopy(self._read)
        cache.batch_repeat_interleave(len(prompts))
        _move_right(cache, moves)
        return cache, shared, [shared - move for move in moves]

    def read(self, parts: Sequence[PromptPart], cache: Any, columns: int) -> Any:
        """Read one part of each text behind the `columns` of a cache; return the model's output.

        A row of the pass is padding, what is certain, what is proposed, and padding up to the
        longest proposal. Any token will do for padding: before the text it is masked, behind it
        nothing looks at it. The logits are those of the last certain token (if there is one) and of
        all columns behind it.
        """
        before = max(len(part.certain) for part in parts)
        behind = max(len(part.proposed) for part in parts)
        ids, starts, ends = [], [], []
        for cached, certain, proposed in parts:
            left, right = before - len(certain), behind - len(proposed)
            ids.append([0] * left + [*certain, *proposed] + [0] * right)
            starts.append(cached - left)
            ends.append(cached + len(certain) + len(proposed) - 1)
        start, end = torch.tensor([starts, ends], device=self.device)[..., None]
        kept = behind + 1 if before else behind
        # A row's text ends in its last columns; the first of the new ones has position `start`.
        position = torch.arange(columns + before + behind, device=self.device) + start - columns
        return self._model(
            input_ids=torch.tensor(ids, device=self.device),
            attention_mask=(position >= 0).long(),
            position_ids=position[:, columns:].clamp(min=0).minimum(end),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last_columns(kept, of=before + behind, device=self.device),
        )


def check_adapter(model: nn.Module) -> None:
    """Raise UnsupportedModelError for an adapter that puts virtual tokens in front of every pass.

    A pass that continues from a cache would then read them again, in the middle of the text.
    """
    peft_config: Any = getattr(model, "active_peft_config", None)
    if peft_config is not None and peft_config.is_prompt_learning:
        raise UnsupportedModelError(
            "answers of prompt-learning adapters cannot be evaluated",
            expected="an adapter inside the layers, such as LORA",
            found=peft_config.peft_type,
        )


def last_columns(kept: int, *, of: int, device: torch.device) -> torch.Tensor:
    """Return the last columns of so many by index: `logits_to_keep` in the form that costs least.

    Asked for by number, transformers slices the hidden states, and a CPU multiplies rows that do
    not lie side by side one by one, each with the whole head (SmolLM2-135M, 32 rows, the last of 20
    columns: 0.42 s instead of 0.06).
    """
    return torch.arange(of - kept, of, device=device)


def supports_truncation(cache: Any) -> int:
    """Return the largest width in columns of which the last ones can be taken back."""
    layers = getattr(cache, "layers", ())
    if not layers or {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer}:
        return 0  # states that run on know no way back
    windows = [layer.sliding_window for layer in layers if layer.is_sliding]
    return min(windows, default=sys.maxsize) - 1  # what has left a window is gone


def truncate_cache(cache: Any, surplus: Sequence[int]) -> int:
    """Take so many last columns from each row; return by how many the cache is narrower now.

    A row that loses more than another moves to the right; what it loses stands to its left then,
    where the mask hides it.
    """
    least = min(surplus)
    cache.crop(-least)
    _move_right(cache, [count - least for count in surplus])
    return least


def _move_right(cache: Any, moves: Sequence[int]) -> None:
    if not any(moves):
        return
    width = cache.layers[0].keys.shape[-2]
    source = (torch.arange(width) - torch.tensor(moves)[:, None]) % width
    for layer in cache.layers:
        here = source[:, None, :, None].to(layer.keys.device)
        layer.keys = layer.keys.take_along_dim(here, dim=2)
        layer.values = layer.values.take_along_dim(here, dim=2)


def _worth_sharing(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[int]:
    """Return the tokens that all prompts begin with, but for each prompt's last; none if few."""
    if len(prompts) < 2 or any(
        word in str(getattr(getattr(model, "config", None), "rope_parameters", ""))
        for word in _CHANGING_ROPES
    ):
        return []
    first, last = min(map(list, prompts)), max(map(list, prompts))  # in order of their tokens
    most = min(map(len, prompts)) - 1
    agreed = next((i for i in range(most) if first[i] != last[i]), max(most, 0))
    return first[:agreed] if agreed * (len(prompts) - 1) > PASS else []
