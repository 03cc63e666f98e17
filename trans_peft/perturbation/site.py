"""One perturbed sub-layer of one layer: its draws, on its device, and its other `forward`."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from trans_peft.domain.recipe import Perturbation
from trans_peft.perturbation.clock import Clock
from trans_peft.perturbation.draws import Draw, Moment, SubLayerKind, draw, element_mask
from trans_peft.perturbation.slicing import Kept

__all__ = ["Site", "override"]

Forward = Callable[..., Any]

_WIDTH = (
    16  # neurons are computed in multiples: odd widths cost 5 % on a CPU, and tensor cores more
)


class Site:
    """The draws of one sub-layer, one per moment; `neurons` are those of its units, in order."""

    def __init__(
        self,
        perturbation: Perturbation,
        clock: Clock,
        seed: int,
        rank: int | None,
        layer: int,
        kind: SubLayerKind,
        neurons: tuple[int, ...],
    ) -> None:
        self.perturbation = perturbation
        self.neurons = neurons
        self._clock = clock
        self._seed, self._layer, self._kind = seed, layer, kind
        self._rank = rank
        self._moment: Moment | None = None
        self._draw: Draw | None = None
        self._kept: dict[tuple[int, int, torch.device], Kept | None] = {}
        self._masks: dict[tuple[int, torch.device], torch.Tensor] = {}

    @property
    def active(self) -> bool:
        """Whether the model is in training mode."""
        return self._clock.training

    @property
    def dropped(self) -> bool:
        """Whether the running forward (or recomputation) leaves this sub-layer out."""
        return self.active and self._now().dropped

    def kept(self, unit: int, parts: int, device: torch.device) -> Kept | None:
        """Return the neurons of a unit to compute; None where all are.

        A fused projection holds the neurons in `parts` parts, one after the other.
        """
        if not self.active or (stays := self._now().kept) is None:
            return None
        place = (unit, parts, device)
        if place not in self._kept:
            mine = stays[self._span(unit)]
            (kept,), (masked,) = mine.nonzero(), (~mine).nonzero()
            idle = masked[: -len(kept) % _WIDTH]
            indices = torch.from_numpy(np.concatenate([kept, idle]))
            fused = torch.cat([indices + part * self.neurons[unit] for part in range(parts)])
            whole = len(indices) == self.neurons[unit] and not len(idle)
            self._kept[place] = (
                None if whole else Kept(fused.to(device, non_blocking=True), len(idle))
            )
        return self._kept[place]

    def masked(self, unit: int, x: torch.Tensor) -> torch.Tensor:
        """Return x (..., neurons of the unit) with its masked neurons, or elements, at zero."""
        if not self.active:
            return x
        now = self._now()
        if now.kept is None:
            p = self.perturbation.masking_p
            return x.masked_fill(~element_mask(now.element_seed + unit, p, x.shape, x.device), 0)
        place = (unit, x.device)
        if place not in self._masks:
            self._masks[place] = torch.from_numpy(~now.kept[self._span(unit)]).to(x.device)
        return x.masked_fill(self._masks[place], 0)

    def _span(self, unit: int) -> slice:
        start = sum(self.neurons[:unit])
        return slice(start, start + self.neurons[unit])

    def _now(self) -> Draw:
        if self._draw is None or self._moment != self._clock.now:
            if self._rank is None:
                # Asked for only now: loops start their process group after `perturbed` is entered.
                self._rank = dist.get_rank() if dist.is_initialized() else 0
            self._moment = self._clock.now
            self._draw = draw(
                self.perturbation,
                self._moment,
                seed=self._seed,
                rank=self._rank,
                layer=self._layer,
                kind=self._kind,
                neurons=sum(self.neurons),
            )
            self._kept.clear()
            self._masks.clear()
        return self._draw


def override(module: nn.Module, forward: Forward, undo: ExitStack) -> None:
    """Give one module instance another `forward` until `undo` closes.

    A deep copy made meanwhile (a reference model) computes as its class says: the override would
    compute with the weights of the module that it was made for.
    """
    before = module.__dict__.get("forward")

    # A compiler would trace into the draws: what is around this module is compiled, not it.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @wraps(type(module).forward)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is not module:
            return type(self).forward(self, *args, **kwargs)
        return forward(*args, **kwargs)

    def restore() -> None:
        del module.forward
        if before is not None:
            module.forward = before

    module.forward = MethodType(method, module)
    undo.callback(restore)
