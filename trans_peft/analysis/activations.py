"""Stream statistics of a base's activations over a fixed set of texts.

The neurons of a sub-layer are those that masking acts on: the inputs of the FFN's down projection
(eq. 4-5 of the paper) and of the attention's output projection. Of each neuron, only the sums of
its activations and of their squares are kept, for at most `BLOCKS` blocks of texts. For a base of
7 billion parameters these are about 320 MB, whatever the number of texts.

The first token of each text is left out: many models have activations there that are orders of
magnitude larger than all others (Sun et al. 2024, "Massive activations in large language models").
The experts of a mixture get their tokens in an order of their own, so all tokens count there.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from trans_peft.domain.recipe import Perturbation
from trans_peft.perturbation.behavior import cloned, floats_of, rows_of
from trans_peft.perturbation.dropping import drop_ffn
from trans_peft.perturbation.mask_site import override
from trans_peft.perturbation.masking import mask_attention, mask_ffn
from trans_peft.perturbation.units import DecoderLayer, FeedForward
from trans_peft.perturbation.verified import found_layers, verified_layers

__all__ = ["BLOCKS", "Activations", "Moments", "measure_activations"]

BLOCKS = 32
"""Largest number of blocks of texts. A bootstrap draws blocks, so this also bounds its units."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over the tokens of each block of texts.

    Attributes:
        tokens: number of tokens (blocks, parts); the experts of a mixture are a part each.
        first: sums of the activations (blocks, neurons).
        second: sums of the squared activations (blocks, neurons).
        parts: the part of each neuron (neurons,).
    """

    tokens: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    parts: torch.Tensor

    @classmethod
    def empty(cls, blocks: int, widths: Sequence[int]) -> "Moments":
        """Return sums of zero for parts with these numbers of neurons."""
        neurons = blocks, sum(widths)
        return cls(
            torch.zeros(blocks, len(widths), dtype=torch.float64),
            torch.zeros(neurons, dtype=torch.float64),
            torch.zeros(neurons, dtype=torch.float64),
            torch.arange(len(widths)).repeat_interleave(torch.tensor(widths)),
        )

    def add(self, block: int, part: int, x: torch.Tensor) -> None:
        """Add the activations x (tokens, neurons of the part) of one block."""
        x = x.float()
        place = self.parts == part
        self.tokens[block, part] += len(x)
        self.first[block, place] += x.sum(0).double().cpu()
        self.second[block, place] += x.square().sum(0).double().cpu()


@dataclass(frozen=True, eq=False)
class Activations:
    """What `measure_activations` keeps of one base.

    Attributes:
        attention: of each layer; None for a layer in which no attention was found.
        ffn: of each layer; None for a layer without an FFN (Mamba).
        influence: sums over tokens of each layer's FFN influence (layers, blocks).
        tokens: number of tokens of those sums (layers, blocks); 0 for a layer without an FFN.
    """

    attention: tuple[Moments | None, ...]
    ffn: tuple[Moments | None, ...]
    influence: torch.Tensor
    tokens: torch.Tensor


@torch.no_grad()
def measure_activations(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Activations:
    """Run a causal language model, with or without an adapter, on texts of token ids.

    The influence of an FFN on a token is (|h| - |h'|) / |h'|, where h is the hidden state after the
    layer and h' the one without the FFN. It is positive if the FFN raises the magnitude of the
    activations (fig. 3). Each layer runs twice per text, one text at a time. The model must be in
    eval mode. UnsupportedModelError if no FFN is found.
    """
    stack, found = found_layers(model, None)
    layers = verified_layers(model, stack, found)
    blocks = min(BLOCKS, len(texts))
    recorded = Activations(
        tuple(_moments(blocks, layer.neurons("attention")) for layer in layers),
        tuple(_moments(blocks, layer.neurons("ffn")) for layer in layers),
        torch.zeros(len(layers), blocks, dtype=torch.float64),
        torch.zeros(len(layers), blocks, dtype=torch.float64),
    )
    run = _Run()
    device = next(model.parameters()).device
    with ExitStack() as undo:
        for index, layer in enumerate(layers):
            _observe(layer, index, recorded, run, undo)
        for number, ids in enumerate(texts):
            run.block, run.length = number % blocks, len(ids)
            model(input_ids=torch.tensor([ids], device=device), use_cache=False)
            on_progress(number + 1, len(texts))
    return recorded


@dataclass
class _Run:
    """The running forward pass: its block, its number of tokens, and whether FFNs are left out."""

    block: int = 0
    length: int = 0
    dropped: bool = False

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Return x as (tokens, width), without the first token of the text."""
        rows = rows_of(x)
        return rows[1:] if len(rows) == self.length else rows


class _Recorder:
    """Masks that mask nothing: they add what they are given to the moments of a sub-layer."""

    active = True
    perturbation = Perturbation(masking_p=0.5)

    def __init__(self, moments: Moments, run: _Run) -> None:
        self._moments, self._run = moments, run

    def kept(self, unit: int, parts: int, device: torch.device) -> None:
        """Compute all neurons."""

    def masked(self, unit: int, x: torch.Tensor) -> torch.Tensor:
        if not self._run.dropped:
            self._moments.add(self._run.block, unit, self._run.tokens(x))
        return x


def _moments(blocks: int, widths: tuple[int, ...]) -> Moments | None:
    return Moments.empty(blocks, widths) if widths else None


def _observe(
    layer: DecoderLayer, index: int, recorded: Activations, run: _Run, undo: ExitStack
) -> None:
    attention, ffn = recorded.attention[index], recorded.ffn[index]
    if attention is not None and layer.attention is not None:
        mask_attention(_Recorder(attention, run), layer.attention, undo)
    if ffn is None:
        return
    units = tuple(
        replace(unit, multiplied="recorded") if isinstance(unit, FeedForward) else unit
        for unit in layer.ffn
    )
    mask_ffn(_Recorder(ffn, run), units, undo)
    drop_ffn(run, layer, undo)
    original = layer.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        again, named = cloned((args, kwargs))  # a layer may write to its input
        run.dropped = True
        try:
            without = original(*again, **named)
        finally:
            run.dropped = False
        result = original(*args, **kwargs)
        after, before = (run.tokens(_hidden(x)).float().norm(dim=-1) for x in (result, without))
        recorded.influence[index, run.block] += ((after - before) / before).double().sum().cpu()
        recorded.tokens[index, run.block] += len(after)
        return result

    override(layer.module, forward, undo)


def _hidden(output: Any) -> torch.Tensor:
    return next(floats_of(output))
