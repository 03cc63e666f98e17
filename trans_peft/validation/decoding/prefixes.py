"""Process several texts in one batch with a key-value cache, and share a common prefix of prompts.

After each pass the cache equals one without sharing: the tokens of each text are contiguous and end
in the last column. Position embeddings (learned, rotary, ALiBi) and local attention are therefore
correct for every architecture. Only the removal of tokens from the cache depends on the type of
cache.

The prefix that all prompts share (few-shot examples, an instruction) is processed once for each
adapter and copied into every batch. A prompt that is shorter than others of its batch
processes the end of the prefix again, in columns that would otherwise be padding. This makes no
pass wider, and leaves no gap between the prefix and the rest of the text.
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from trans_peft.errors import UnsupportedModelError
from trans_peft.validation.decoding.drafts import PASS_OVERHEAD_TOKENS

__all__ = [
    "CacheSupport",
    "PrefixReader",
    "PromptPart",
    "check_adapter",
    "last_columns",
    "shared_prefix",
    "supports_truncation",
    "truncate_cache",
]

_LENGTH_DEPENDENT_ROPES = ("dynamic", "longrope")
"""Types of rotary embedding with frequencies that depend on the length of the text. With them the
cache of a prefix is not the start of a longer text's cache."""


@dataclass(frozen=True)
class CacheSupport:
    """How a model can be read through a cache (`decoding.cache_support` finds out).

    Attributes:
        batched: Texts of different lengths may share a pass.
        positions: The model takes `position_ids` that count from zero.
        continues: Several tokens may be read behind a cache in one pass.
    """

    batched: bool = True
    positions: bool = True
    continues: bool = True


class PromptPart(NamedTuple):
    """The tokens of one text in a pass: `certain` and `proposed` ones, after `cached` tokens.

    `adapter` is the name of the text's adapter, for a model with several.
    """

    cached: int
    certain: Sequence[int]
    proposed: Sequence[int] = ()
    adapter: str | None = None


class PrefixReader:
    """Runs one model on batches of texts, and caches the common prefix of `prompts`.

    `adapters` are the names of their adapters, for a model with several (`adapter_names`, as in
    PEFT); each adapter has its own cache of the prefix.
    """

    def __init__(
        self,
        model: nn.Module,
        support: CacheSupport,
        prompts: Sequence[Sequence[int]] = (),
        adapters: Sequence[str | None] | None = None,
    ) -> None:
        check_adapter(model)
        self._model = model
        self._is_mixed = adapters is not None
        self.support = support
        self.device = next(model.parameters()).device
        self._row_of = {name: row for row, name in enumerate(dict.fromkeys(adapters or [None]))}
        self._prefix = shared_prefix(model, prompts, copies=len(self._row_of))
        self._prefix_cache: Any = None

    def begin(
        self, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None] | None = None
    ) -> tuple[Any, int, list[int]]:
        """Return a cache (None: empty), its width in columns, and each prompt's cached tokens.

        At least one token of each prompt is not cached. The remaining tokens of a prompt fill at
        most as many columns as those of the longest prompt.
        """
        if self._prefix and self._prefix_cache is None:
            parts = [PromptPart(0, self._prefix, adapter=name) for name in self._row_of]
            out = self.read(parts, None, 0)
            self._prefix_cache = out.past_key_values
            if supports_truncation(self._prefix_cache) < len(self._prefix):
                self._prefix = []  # the cache has a recurrent state, or a window dropped its start
        shared = len(self._prefix)
        if not shared:
            return None, 0, [0] * len(prompts)
        most = max(map(len, prompts)) - shared
        moves = [min(most + shared - len(prompt), shared) for prompt in prompts]
        cache = copy.deepcopy(self._prefix_cache)
        rows = [self._row_of[name] for name in adapters or [None] * len(prompts)]
        cache.reorder_cache(torch.tensor(rows, device=self.device))
        _move_right(cache, moves)
        return cache, shared, [shared - move for move in moves]

    def read(self, parts: Sequence[PromptPart], cache: Any, columns: int) -> Any:
        """Run the model on one part of each text after the `columns` of a cache; return its output.

        Each row consists of padding, the certain tokens, the proposed tokens, and padding up to the
        longest proposal. Padding may be any token: before the text it is masked, and after it no
        token attends to it. Logits are computed for the last certain token, if there is one, and
        for all columns after it.
        """
        before = max(len(part.certain) for part in parts)
        behind = max(len(part.proposed) for part in parts)
        ids, starts, ends = [], [], []
        for cached, certain, proposed, _ in parts:
            left, right = before - len(certain), behind - len(proposed)
            ids.append([0] * left + [*certain, *proposed] + [0] * right)
            starts.append(cached - left)
            ends.append(cached + len(certain) + len(proposed) - 1)
        start, end = torch.tensor([starts, ends], device=self.device)[..., None]
        kept = behind + 1 if before else behind
        # The text of a row is at its right end; its first new column has the position `start`.
        position = torch.arange(columns + before + behind, device=self.device) + start - columns
        positions = {"position_ids": position[:, columns:].clamp(min=0).minimum(end)}
        names = {"adapter_names": [part.adapter for part in parts]}
        return self._model(
            input_ids=torch.tensor(ids, device=self.device),
            attention_mask=(position >= 0).long(),
            **(positions if self.support.positions else {}),
            **(names if self._is_mixed else {}),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            logits_to_keep=last_columns(kept, of=before + behind, device=self.device),
        )


def check_adapter(model: nn.Module) -> None:
    """Raise UnsupportedModelError for an adapter that inserts virtual tokens before every pass.

    A pass that continues from a cache would insert them again, in the middle of the text.
    """
    peft_config: Any = getattr(model, "active_peft_config", None)
    if peft_config is not None and peft_config.is_prompt_learning:
        raise UnsupportedModelError(
            "prompt-learning adapters cannot be evaluated",
            expected="an adapter inside the layers, such as LORA",
            found=peft_config.peft_type,
        )


def last_columns(kept: int, *, of: int, device: torch.device) -> torch.Tensor:
    """Return the indices of the last `kept` of `of` columns, as a value of `logits_to_keep`.

    With a number instead of indices, transformers slices the hidden states. A CPU then multiplies
    the rows one by one with the whole head, because they are not contiguous (SmolLM2-135M, 32 rows,
    the last of 20 columns: 7x slower, 0.42 s instead of 0.06 s).
    """
    return torch.arange(of - kept, of, device=device)


def supports_truncation(cache: Any) -> int:
    """Return the largest width in columns from which the last columns can be removed."""
    layers = getattr(cache, "layers", ())
    if not layers or {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer}:
        return 0  # a recurrent state cannot be rolled back
    windows = [layer.sliding_window for layer in layers if layer.is_sliding]
    return min(windows, default=sys.maxsize) - 1  # columns outside of a window are lost


def truncate_cache(cache: Any, surplus: Sequence[int]) -> int:
    """Remove the last `surplus` columns of each row; return by how many the cache got narrower.

    The cache shrinks by the smallest surplus. A row that loses more moves to the right, and its
    removed columns end up at its left, where they are masked.
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


def shared_prefix(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, copies: int = 1
) -> list[int]:
    """Return the common prefix of all prompts, without the last token of any.

    It is empty if reading it once for each of `copies` adapters would save nothing.
    """
    if len(prompts) <= copies or any(
        word in str(getattr(getattr(model, "config", None), "rope_parameters", ""))
        for word in _LENGTH_DEPENDENT_ROPES
    ):
        return []
    first, last = min(map(list, prompts)), max(map(list, prompts))  # in order of their tokens
    most = min(map(len, prompts)) - 1
    agreed = next((i for i in range(most) if first[i] != last[i]), max(most, 0))
    return first[:agreed] if agreed * (len(prompts) - copies) > PASS_OVERHEAD_TOKENS else []
