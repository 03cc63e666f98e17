"""The paper's formulas on the weights of any architecture, independent of how FFNs are found.

Masking neuron i of an FFN zeroes column i of its down projection. Dropping an FFN zeroes its down
projections and what is added after them. This module lists the names of the down projections in
transformers, so it is independent of the library's search by shape.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trans_peft.domain.recipe import Perturbation
from trans_peft.perturbation.draws import TrainingPosition, draw

__all__ = ["formula_weights"]

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks|ffns|ff)\.(\d+)\.")
_DOWN = re.compile(
    r"\.(?:"
    r"(?:mlp|mlps\.\d|feed_forward|ffn|ff|mlp_block|shared_mlp|block_sparse_moe|mixer|mlp\.experts"
    r"|(?:mlp|feed_forward|mixer)\.shared_(?:experts?|mlp)|experts|ffn\.ffn|ffn\.experts\.mlp)"
    r"\.(?:down_proj|dense_4h_to_h|c_proj|fc2|fc_out|w2|w_out|output_linear|output|layer_2|2"
    r"|proj_down|Wo|experts\.down_proj|lin2)"
    r"|fc2|layer\.\d+\.output\.dense|feed_forward\.output\.dense|lin2"
    r")(?:\.weight)?$"
)
_ELSEWHERE = re.compile(r"attention|attn|layernorm\.mlp|router|vision|image|audio|patcher")
"""Parts of names of weights that have such an ending and are no FFN of a decoder layer."""

_TRANSPOSED = {"aria_text", "gpt_oss", "llama4", "llama4_text"}
"""Architectures whose experts hold their down projections as (experts, f, d)."""


@dataclass(frozen=True)
class Down:
    """One down projection: its parameter, the axis of its neurons, and what is added after it."""

    name: str
    axis: int
    neurons: int
    biases: tuple[str, ...]


def formula_weights(
    model: nn.Module, model_type: str, perturbation: Perturbation, seed: int, stack: str = ""
) -> dict[str, torch.Tensor]:
    """Return the weights that are equivalent to the draws of the first forward pass.

    `stack` is the path of the decoder, for a model of several.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    layers: dict[int, list[Down]] = {}
    for layer, down in _downs(model, model_type):
        if not down.name.startswith(stack):
            continue
        layers.setdefault(layer, []).append(down)
    replaced = {}
    for layer, downs in layers.items():
        sizes = [down.neurons for down in downs]
        drawn = draw(
            perturbation,
            TrainingPosition(0, 0),
            seed=seed,
            rank=0,
            layer=layer,
            kind="ffn",
            neurons=sum(sizes),
        )
        kept = torch.ones(sum(sizes))
        if drawn.kept is not None:
            kept = torch.from_numpy(drawn.kept).float()
        z = 0.0 if drawn.dropped else 1.0
        for down, mask in zip(downs, kept.split(sizes), strict=True):
            weight = own[down.name]
            repeated = mask.repeat(weight.shape[down.axis] // down.neurons)  # DBRX: experts * f
            shape = [1] * weight.dim()
            shape[down.axis] = -1
            replaced[down.name] = weight * repeated.view(shape) * z
            for bias in down.biases:
                replaced[bias] = own[bias] * z
    return replaced


def _downs(model: nn.Module, model_type: str) -> Iterator[tuple[int, Down]]:
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in own.items():
        layer = _LAYER.search(name)
        if layer is None or weight.dim() < 2:
            continue
        if not _DOWN.search(name) or _ELSEWHERE.search(name):
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        axis = 0 if isinstance(module, Conv1D) else -1
        neurons = weight.shape[axis]
        if model_type in _TRANSPOSED and weight.dim() == 3:
            axis, neurons = -2, weight.shape[-2]
        if model_type == "dbrx":
            axis, neurons = 0, module.ffn_hidden_size
        stem = name.removesuffix(".weight")
        biases = (f"{stem}.bias", f"{stem}_bias", f"{stem.rpartition('.')[0]}.bias")
        yield int(layer[1]), Down(name, axis, neurons, tuple(b for b in biases if b in own))
