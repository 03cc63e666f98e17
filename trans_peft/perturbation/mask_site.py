"""One perturbed sub-layer of one layer: its draws, on its device, and its other `forward`."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trans_peft.domain.recipe import Perturbation
from trans_peft.perturbation.draws import Draw, SubLayerKind, TrainingPosition, draw, element_mask
from trans_peft.perturbation.slicing import NeuronSelection, neurons_to_compute
from trans_peft.perturbation.step_counter import StepCounter

__all__ = ["MaskSite", "override"]

Forward = Callable[..., Any]


class MaskSite:
    """The draws of one sub-layer, one per moment; `neurons` are those of its units, in order."""

    def __init__(
        self,
        perturbation: Perturbation,
        step_counter: StepCounter,
        seed: int,
        rank: int | None,
        layer: int,
        kind: SubLayerKind,
        neurons: tuple[int, ...],
    ) -> None:
        self.perturbation = perturbation
        self.neurons = neurons
        self._step_counter = step_counter
        self._seed, self._layer, self._kind = seed, layer, kind
        self._rank = rank
        self._moment: TrainingPosition | None = None
        self._draw: Draw | None = None
        self._kept: dict[tuple[int, int, torch.device], NeuronSelection | None] = {}
        self._masks: dict[tuple[int, torch.device], torch.Tensor] = {}

    @property
    def active(self) -> bool:
        """Whether the model is in training mode."""
        return self._step_counter.training

    @property
    def dropped(self) -> bool:
        """Whether the running forward (or recomputation) leaves this sub-layer out."""
        return self.active and self._now().dropped

    def kept(self, unit: int, parts: int, device: torch.device) -> NeuronSelection | None:
        """Return the neurons of a unit to compute; None where all are.

        A fused projection holds the neurons in `parts` parts, one after the other.
        """
        if not self.active or (stays := self._now().kept) is None:
            return None
        place = (unit, parts, device)
        if place not in self._kept:
            self._kept[place] = neurons_to_compute(stays[self._span(unit)], parts, device)
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
        if self._draw is None or self._moment != self._step_counter.now:
            if self._rank is None:
                # Asked for only now: loops start their process group after `perturbed` is entered.
                self._rank = dist.get_rank() if dist.is_initialized() else 0
            self._moment = self._step_counter.now
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


def override(module: nn.Module, forward: Forward, undo: ExitStack, name: str = "forward") -> None:
    """Give one module instance another `forward` (or method `name`) until `undo` closes.

    A deep copy made meanwhile (a reference model) computes as its class says: the override would
    compute with the weights of the module that it was made for.
    """
    before = module.__dict__.get(name)
    of_class: Forward = getattr(type(module), name, before or forward)

    # A compiler would trace into the draws: what is around this module is compiled, not it.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @wraps(of_class)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is not module:
            own = getattr(type(self), name, None)
            return of_class(*args, **kwargs) if own is None else own(self, *args, **kwargs)
        return forward(*args, **kwargs)

    def restore() -> None:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)

    setattr(module, name, MethodType(method, module))
    undo.callback(restore)
