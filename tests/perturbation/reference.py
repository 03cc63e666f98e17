"""The paper's formulas as changed weights: the reference implementation of the perturbation.

Masking the neurons i equals zeroing the columns i of the down projection. Dropping an FFN equals
zeroing its down projection. Both are computed by calling the model with other weights
(`torch.func.functional_call`), without hooks, slices or replaced methods.
"""

from dataclasses import dataclass

import torch
from torch import nn

from trans_peft.domain.recipe import Perturbation
from trans_peft.perturbation.draws import TrainingPosition, draw

START = TrainingPosition(0, 0)


@dataclass(frozen=True)
class Down:
    """Names of the down projections of a layer, as formats of the layer number.

    `axis` is their neuron axis. `biases` are added after the sum over neurons.
    """

    weights: tuple[str, ...]
    axis: int = -1
    biases: tuple[str, ...] = ()


def reference_weights(
    model: nn.Module,
    down: Down,
    perturbation: Perturbation,
    *,
    layers: int,
    seed: int,
    position: TrainingPosition = START,
    rank: int = 0,
    kind: str = "ffn",
) -> dict[str, torch.Tensor]:
    """Return weights that are equivalent to the draws of one forward pass."""
    own = dict(model.named_parameters())
    replaced = {}
    for layer in set(range(layers)) - set(perturbation.spared_layers):
        weights = [own[name.format(layer)] for name in down.weights]
        sizes = [weight.shape[down.axis] for weight in weights]
        drawn = draw(
            perturbation, position, seed=seed, rank=rank, layer=layer, kind=kind, neurons=sum(sizes)
        )
        kept = (
            torch.ones(sum(sizes)) if drawn.kept is None else torch.from_numpy(drawn.kept).float()
        )
        z = 0.0 if drawn.dropped else 1.0
        for name, weight, mask in zip(down.weights, weights, kept.split(sizes), strict=True):
            shape = [1] * weight.dim()
            shape[down.axis] = -1
            replaced[name.format(layer)] = weight * mask.view(shape).to(weight) * z
        for name in down.biases:
            replaced[name.format(layer)] = own[name.format(layer)] * z
    return replaced


def loss_and_gradients(
    model: nn.Module, ids: torch.Tensor, weights: dict[str, torch.Tensor] | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the logits, and the gradient of every trainable parameter (zeros if it is None)."""
    model.zero_grad()
    output = torch.func.functional_call(model, weights or {}, (), {"input_ids": ids, "labels": ids})
    output.loss.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return output.logits.detach(), gradients
