"""Distances between the activations of two bases, with bootstrap intervals over texts.

The distance of a sub-layer is the relative Frechet distance with independent neurons

    d = sqrt( sum_i (m'_i - m_i)^2 + (s'_i - s_i)^2 ) / sqrt( sum_i m_i^2 + s_i^2 )

where m_i and s_i are the mean and the standard deviation of neuron i on the old base, m'_i and s'_i
those on the new one. Each term is a lower bound of the squared 2-Wasserstein distance between the
neuron's two distributions (Gelbrich 1990), and equal to it if they differ in location and scale
only. Decision 0210 compares it with distances of histograms.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from trans_peft.analysis.activations import Activations, Moments

__all__ = ["Distances", "Interval", "compare_activations", "influence", "profile"]

RESAMPLES = 400
COLUMNS = 256
_CHUNK = 8192  # neurons that a bootstrap computes together


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval (percentile bootstrap over blocks of texts)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f}, {self.high:.3f})"

    @classmethod
    def of(cls, values: torch.Tensor) -> "Interval":
        """Return the interval of (1 + resamples,) values, of which the first is the estimate."""
        low, high = torch.quantile(values[1:], torch.tensor([0.025, 0.975], dtype=values.dtype))
        return cls(values[0].item(), low.item(), high.item())


@dataclass(frozen=True)
class Distances:
    """How far the activations of two bases differ.

    Attributes:
        attention: distance of each layer's attention; None for a layer without one.
        ffn: distance of each layer's FFN; None for a layer without one.
        attention_mean: mean over the layers.
        ffn_mean: mean over the layers.
        difference: `ffn_mean` - `attention_mean`, drawn on the same texts; None without attention.
            The paper's observation is that it is positive (figures 1, 2, 8 and 9).
    """

    attention: tuple[Interval | None, ...]
    ffn: tuple[Interval | None, ...]
    attention_mean: Interval | None
    ffn_mean: Interval | None
    difference: Interval | None


def compare_activations(old: Activations, new: Activations) -> Distances:
    """Compare two bases that were measured on the same texts. All figures share their resamples."""
    draws = _draws(old.tokens.shape[1])
    attention, ffn = (
        [None if a is None or b is None else _distance(a, b, draws) for a, b in pairs]
        for pairs in (
            zip(old.attention, new.attention, strict=True),
            zip(old.ffn, new.ffn, strict=True),
        )
    )
    means = [_mean(found) for found in (attention, ffn)]
    difference = None if means[0] is None or means[1] is None else means[1] - means[0]
    return Distances(_intervals(attention), _intervals(ffn), *_intervals([*means, difference]))


def influence(found: Activations) -> tuple[Interval | None, ...]:
    """Return the influence of each layer's FFN (fig. 3), averaged over tokens."""
    draws = _draws(found.tokens.shape[1])
    return _intervals(
        (draws @ sums) / (draws @ tokens) if tokens.any() else None
        for sums, tokens in zip(found.influence, found.tokens, strict=True)
    )


def profile(moments: Moments) -> tuple[float, ...]:
    """Return where the activations of a sub-layer are large: one row of the heat maps.

    Adjacent neurons form at most `COLUMNS` groups. A value is the root mean square of a group
    relative to that of the whole sub-layer.
    """
    once = torch.ones(1, len(moments.tokens), dtype=torch.float64)
    (second,) = _means(moments, once, torch.arange(len(moments.parts)))[1]
    groups = torch.tensor_split(second, min(COLUMNS, len(second)))
    mean = second.mean().clamp(min=torch.finfo(second.dtype).tiny)
    return tuple(round((group.mean() / mean).sqrt().item(), 4) for group in groups)


def _draws(blocks: int) -> torch.Tensor:
    """Return how often each resample has each block (1 + resamples, blocks); first: once each."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(blocks, (RESAMPLES, blocks), generator=generator)
    counts = torch.nn.functional.one_hot(drawn, blocks).sum(1)
    return torch.cat((torch.ones(1, blocks), counts)).double()


def _means(
    moments: Moments, draws: torch.Tensor, neurons: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means of the activations and of their squares (draws, neurons)."""
    tokens = (draws @ moments.tokens).clamp(min=1)[:, moments.parts[neurons]]
    first, second = (draws @ sums[:, neurons] for sums in (moments.first, moments.second))
    return first / tokens, second / tokens


def _distance(old: Moments, new: Moments, draws: torch.Tensor) -> torch.Tensor:
    moved = total = torch.zeros(len(draws), dtype=draws.dtype)
    for neurons in torch.arange(len(old.parts)).split(_CHUNK):
        (mean, second), (new_mean, new_second) = (_means(m, draws, neurons) for m in (old, new))
        std, new_std = _std(mean, second), _std(new_mean, new_second)
        moved = moved + ((new_mean - mean) ** 2 + (new_std - std) ** 2).sum(1)
        total = total + second.sum(1)
    return (moved / total.clamp(min=torch.finfo(total.dtype).tiny)).sqrt()


def _std(mean: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (second - mean**2).clamp(min=0).sqrt()


def _mean(values: list[torch.Tensor | None]) -> torch.Tensor | None:
    found = [value for value in values if value is not None]
    return torch.stack(found).mean(0) if found else None


def _intervals(values: Iterable[torch.Tensor | None]) -> tuple[Interval | None, ...]:
    return tuple(None if value is None else Interval.of(value) for value in values)
