"""Assign the tensors of a checkpoint to the attention and the FFN of each layer.

Only config.json and the shapes are used; the model is built without weights. config.json may be
untrusted: then call `sublayers` through `trans_peft.isolation`.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from trans_peft.bases.meta_model import build_model
from trans_peft.errors import UnsupportedModelError, listed

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["OTHER", "SubLayer", "sublayers"]

SubLayer = tuple[str, int]
"""("attention" or "ffn", index of the layer)."""

OTHER: SubLayer = ("other", -1)
"""Embeddings, norms, routers, the output head, and weights beside the language model."""


def sublayers(config: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, SubLayer]:
    """Return the sub-layer of each tensor; `OTHER` for tensors of neither kind.

    `config` is the text of config.json, `shapes` are those of the tensors by their names in the
    files, where experts may be separate tensors. The mixer of a layer without attention (Mamba)
    counts as its attention. UnsupportedModelError if the tensors of a sub-layer have another number
    of elements than its module.
    """
    model = build_model(config)[1]
    owners = _owners(model)
    found = {name: _lookup(spelled, owners) for name, spelled in _model_names(model, shapes)}
    _check_complete(model, owners, found, shapes)
    return found


def _owners(model: "nn.Module") -> dict[str, SubLayer]:
    """Return the sub-layer of each parameter, and of each module that has one sub-layer's only."""
    from trans_peft.perturbation.ffn import candidate_layers, preferred

    owner: dict[int, SubLayer] = {}
    for index, layer in enumerate(candidate_layers(model)[1]):
        if layer.attention is not None:
            owner |= dict.fromkeys(_ids(layer.attention.module), ("attention", index))
        for unit in preferred(layer.ffn):
            for module in unit.modules:
                owner |= dict.fromkeys(_ids(module), ("ffn", index))
    owners = {
        name: owner.get(id(parameter), OTHER)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    for name, module in model.named_modules():
        inside = {owner.get(key, OTHER) for key in _ids(module)}
        if len(inside) == 1 and inside != {OTHER}:
            owners[name] = inside.pop()
    return owners


def _ids(module: "nn.Module") -> Iterator[int]:
    return (id(parameter) for parameter in module.parameters())


def _model_names(
    model: "PreTrainedModel", names: Iterable[str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each name with its spellings in the model, the likeliest first.

    transformers renames tensors when it loads them. The tensors of a text model inside a multimodal
    checkpoint have a longer name, which is tried without its first parts.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    weights = model.state_dict()
    for name in sorted(names, key=dot_natural_key):  # the order of a load
        renamed, _ = rename_source_key(
            name, renamings, converters, model.base_model_prefix, weights
        )
        parts = name.split(".")
        yield name, (renamed, *(".".join(parts[n:]) for n in range(len(parts))))


def _lookup(spellings: Iterable[str], owners: Mapping[str, SubLayer]) -> SubLayer:
    """Return the owner of a tensor, or of the innermost module around it that has an owner."""
    for path in spellings:
        while path:
            if path in owners:
                return owners[path]
            path = path.rpartition(".")[0]
    return OTHER


def _check_complete(
    model: "nn.Module",
    owners: Mapping[str, SubLayer],
    found: Mapping[str, SubLayer],
    shapes: Mapping[str, Sequence[int]],
) -> None:
    expected: dict[SubLayer, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        expected[owners[name]] += parameter.numel()
    sizes: dict[SubLayer, int] = defaultdict(int)
    for name, shape in shapes.items():
        sizes[found[name]] += math.prod(shape)
    wrong = [
        f"{kind} of layer {layer}: {sizes[kind, layer]:,} elements instead of {size:,}"
        for (kind, layer), size in sorted(expected.items())
        if (kind, layer) != OTHER and sizes[kind, layer] != size
    ]
    if wrong:
        raise UnsupportedModelError(
            "the tensors of the checkpoint cannot be assigned to sub-layers",
            expected="for each attention and FFN, tensors with the elements of its module",
            found=listed(wrong),
            do="save the model again with save_pretrained(folder)",
        )
