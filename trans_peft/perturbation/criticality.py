"""Which layers must not be dropped: the loss that removing one layer's FFN adds.

The paper drops every layer with the same chance. In a small model a few FFNs carry so much that a
step without one of them teaches the adapter nothing: on SmolLM2-135M removing layer 0's adds 9.7
nats a token, two others 1.5, most between 0.1 and 0.3. Measuring that takes one forward a layer.
"""

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from trans_peft.errors import InvalidSpecError
from trans_peft.perturbation.dropping import drop_ffn
from trans_peft.perturbation.layout import Layout
from trans_peft.perturbation.verified import found_layers, verified_layers

__all__ = ["layer_criticality", "propose_spared_layers"]


class _Removed:
    """A site at which the sub-layer is always dropped."""

    dropped = True


@torch.no_grad()
def layer_criticality(
    model: nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    *,
    layout: Layout | None = None,
) -> tuple[float, ...]:
    """Return, layer by layer, the nats per token that the loss gains without that layer's FFN.

    `batches` are what the model is called with, `labels` (batch, length) included; a few hundred
    tokens tell the layers apart. The model is measured in eval mode and left in the mode it came
    in. It takes (layers + 1) forwards of each batch. UnsupportedModelError where no FFN is found.
    """
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    if not tokens:
        raise InvalidSpecError(
            "no token has a label to measure the loss on",
            do="give batches whose labels are not all -100",
        )
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        stack, found = found_layers(model, layout)
        layers = verified_layers(model, stack, found, stated=layout is not None)
        whole = _loss(model, batches, tokens)
        added = []
        for layer in layers:
            with ExitStack() as undo:
                drop_ffn(_Removed(), layer, undo)
                added.append(_loss(model, batches, tokens) - whole)
    finally:
        for module, training in modes.items():
            module.training = training
    return tuple(added)


def propose_spared_layers(
    criticality: Sequence[float], times_median: float = 3.0
) -> tuple[int, ...]:
    """Return the layers whose criticality is above `times_median` times the median layer's.

    Relative to the median because the level differs from model to model. On SmolLM2-135M three
    times the median spares layers 0, 2, 11, 28 and 29 of 30. Use it as
    `replace(perturbation, spared_layers=...)`; the paper's own policy, uniform, spares none.
    """
    if not criticality:
        return ()
    limit = times_median * max(statistics.median(criticality), 0.0)
    return tuple(layer for layer, added in enumerate(criticality) if added > limit)


def _loss(model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]], tokens: int) -> float:
    total = 0.0
    for batch in batches:
        count = int((batch["labels"][:, 1:] != -100).sum())
        total += model(**batch).loss.item() * count
    return total / tokens
