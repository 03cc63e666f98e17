"""Compile the decoder layers of a model with `torch.compile`, each on its own.

Compiling layers instead of the whole model is PyTorch's regional compilation: layers of one kind
share their code. The embeddings and the output embedding are not compiled, because
`AnswerTrainer` selects the positions of the output embedding in a hook, and compiled code ignores
hooks that are registered later.
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from trans_peft.errors import UnsupportedModelError

__all__ = ["compile_layers"]

_VARIANTS = 8
"""Compilations for each layer: other lengths of rows, masks, and the recomputation."""


def compile_layers(model: nn.Module) -> None:
    """Compile the decoder layers in place. UnsupportedModelError if the model has none.

    Modules that `perturbed` replaced are not compiled, and they differ between layers, so that each
    layer may need code of its own.
    """
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder layers that can be compiled",
            expected="layers of the class GradientCheckpointingLayer of transformers",
            do="remove compute.compile from the recipe",
        )
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _VARIANTS * len(layers))
    for layer in layers:
        layer.compile()
