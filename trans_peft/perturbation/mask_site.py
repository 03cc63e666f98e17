"""The draws of one perturbed sub-layer, and replaced `forward` methods."""

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
    """The draws of one sub-layer, one per training position.

    `neurons` are the numbers of neurons of its units, in order. The draw of the current position is
    cached, with its masks by device.
    """

    def __init__(  # noqa: PLR0913  all that the draws depend on
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
        self._drawn_position: TrainingPosition | None = None
        self._draw: Draw | None = None
        self._kept: dict[tuple[int, int, torch.device], NeuronSelection | None] = {}
        self._masks: dict[tuple[int, torch.device], torch.Tensor] = {}

    @property
    def active(self) -> bool:
        """Whether the model is in training mode."""
        return self._step_counter.training

    @property
    def dropped(self) -> bool:
        """Whether the running forward pass (or recomputation) drops this sub-layer."""
        return self.active and self._current_draw().dropped

    def kept(self, unit: int, parts: int, device: torch.device) -> NeuronSelection | None:
        """Return the neurons of a unit to compute; None for all of them.

        A fused projection has the neurons `parts` times, one block after the other.
        """
        if not self.active or (kept := self._current_draw().kept) is None:
            return None
        place = (unit, parts, device)
        if place not in self._kept:
            self._kept[place] = neurons_to_compute(kept[self._span(unit)], parts, device)
        return self._kept[place]

    def masked(self, unit: int, x: torch.Tensor) -> torch.Tensor:
        """Return x (..., neurons of the unit) with masked neurons, or elements, set to zero."""
        if not self.active:
            return x
        current = self._current_draw()
        if current.kept is None:
            p = self.perturbation.masking_p
            return x.masked_fill(
                ~element_mask(current.element_seed + unit, p, x.shape, x.device), 0
            )
        place = (unit, x.device)
        if place not in self._masks:
            self._masks[place] = torch.from_numpy(~current.kept[self._span(unit)]).to(x.device)
        return x.masked_fill(self._masks[place], 0)

    def _span(self, unit: int) -> slice:
        start = sum(self.neurons[:unit])
        return slice(start, start + self.neurons[unit])

    def _current_draw(self) -> Draw:
        if self._draw is None or self._drawn_position != self._step_counter.position:
            if self._rank is None:
                # Training loops may start their process group after `perturbed` is entered.
                self._rank = dist.get_rank() if dist.is_initialized() else 0
            self._drawn_position = self._step_counter.position
            self._draw = draw(
                self.perturbation,
                self._drawn_position,
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
    """Replace the method `name` of one module instance until `undo` closes.

    A deep copy of the module (a reference model) uses the method of its class instead, because
    the override computes with the weights of the original.
    """
    before = module.__dict__.get(name)
    of_class: Forward = getattr(type(module), name, before or forward)

    # torch.compile must not trace the draws; the modules around this one are still compiled.
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
