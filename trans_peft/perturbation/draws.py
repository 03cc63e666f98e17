"""The coins of Trans-PEFT: eq. 4-7 of the paper, as pure functions of where training stands.

A draw depends on (seed, rank, optimiser step, micro-step, layer) and on nothing else: it comes from
a counter-based generator (Philox, Salmon et al. 2011) whose key and counter are these numbers.
Recomputing a layer under activation checkpointing, resuming a run or replaying one step therefore
sees the same draw. The authors' code throws Python's global `random` and torch's global generator
instead, which recomputation advances.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from trans_peft.domain.recipe import Perturbation

__all__ = ["Draw", "SubLayerKind", "TrainingPosition", "draw", "element_mask"]

SubLayerKind = Literal["ffn", "attention"]

_KINDS: dict[SubLayerKind, int] = {"ffn": 0, "attention": 1}


@dataclass(frozen=True)
class TrainingPosition:
    """Where training stands: optimiser steps done, and training forwards since the last of them."""

    step: int
    micro_step: int


@dataclass(frozen=True, eq=False)
class Draw:
    """What happens to one sub-layer in one forward pass.

    `kept` (neurons,) is true where a neuron stays; None where nothing is masked neuron by neuron.
    `element_seed` seeds the mask where each element has its own bit (`element_mask`).
    """

    dropped: bool
    kept: np.ndarray | None
    element_seed: int


def draw(
    perturbation: Perturbation,
    position: TrainingPosition,
    *,
    seed: int,
    rank: int,
    layer: int,
    kind: SubLayerKind,
    neurons: int,
) -> Draw:
    """Return the draw of one sub-layer: z ~ Bernoulli(1 - p_d), m_i ~ Bernoulli(1 - p_m)."""
    # Philox counts upwards in its first word, so that the other three tell the streams apart.
    philox = np.random.Philox(
        key=np.array([seed, rank], dtype=np.uint64),
        counter=np.array(
            [0, len(_KINDS) * layer + _KINDS[kind], position.step, position.micro_step],
            dtype=np.uint64,
        ),
    )
    element_seed = int(philox.random_raw() >> np.uint64(1))
    stream = np.random.Generator(philox)
    dropped = bool(stream.random() < perturbation.dropping_p)
    masks_neurons = perturbation.masking_p > 0 and perturbation.granularity == "neuron"
    kept = stream.random(neurons) >= perturbation.masking_p if masks_neurons else None
    return Draw(dropped, kept, element_seed)


def element_mask(
    element_seed: int, masking_p: float, shape: torch.Size, device: torch.device
) -> torch.Tensor:
    """Return a boolean mask of `shape`, true where an element stays.

    It is drawn on `device`, because it is as large as the activation: the same device type gives
    the same mask again, another device type gives another one.
    """
    generator = torch.Generator(device).manual_seed(element_seed)
    return torch.rand(shape, generator=generator, device=device) >= masking_p
