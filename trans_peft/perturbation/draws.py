"""The random draws of Trans-PEFT (eq. 4-7), as pure functions of the training position.

A draw depends on (seed, rank, optimizer step, micro-step, layer) only. It comes from a counter-
based generator (Philox, Salmon et al. 2011) with these numbers as key and counter. Activation
checkpointing, a resumed run and a replayed step therefore get the same draw. The authors' code uses
Python's global `random` and torch's global generator, which advance when a layer is recomputed.
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
    """Completed optimizer steps, and training forward passes since the last one."""

    step: int
    micro_step: int


@dataclass(frozen=True, eq=False)
class Draw:
    """The draw of one sub-layer for one forward pass.

    Attributes:
        dropped: whether the sub-layer is dropped.
        kept: (neurons,) bool, true for neurons that are not masked; None if no neurons are masked
            (probability 0, or granularity "element").
        element_seed: seed of the mask of elements (`element_mask`).
    """

    dropped: bool
    kept: np.ndarray | None
    element_seed: int


def draw(  # noqa: PLR0913  all that the draw depends on
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
    # Philox increments the first word of its counter; the other three identify the stream.
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
    """Return a boolean mask of `shape`, true for elements that are not masked.

    It is drawn on `device`, because it is as large as the activation. The mask is reproducible on
    the same type of device only.
    """
    generator = torch.Generator(device).manual_seed(element_seed)
    return torch.rand(shape, generator=generator, device=device) >= masking_p
