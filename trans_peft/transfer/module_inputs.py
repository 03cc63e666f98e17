"""Inputs of the linear modules of a base while an adapter processes token sequences."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trans_peft.errors import UnsupportedModelError
from trans_peft.transfer.load_adapter import attached

__all__ = ["MAX_TOKENS", "ModuleInputs", "module_inputs"]

MAX_TOKENS = 8_192
"""Tokens of sequences that are useful: more inputs hardly change a compensation."""

_INPUTS = 4_096
"""Inputs of each module that are kept, from random positions of the sequences."""

_BATCH = 16


@dataclass(frozen=True)
class ModuleInputs:
    """Inputs of a linear module.

    Attributes:
        weight: name of the module's weight in the files of the base. The weight of an output layer
            may be that of the input embedding.
        values: the inputs, of shape (n, in_features).
        of_output_layer: whether the module is the output layer.
    """

    weight: str
    values: Tensor
    of_output_layer: bool = False


def module_inputs(
    model: PreTrainedModel,
    adapter: Path,
    sequences: Sequence[Sequence[int]],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Mapping[str, ModuleInputs]:
    """Return inputs of the linear modules of a base with an adapter, by the names of the modules.

    Two kinds of modules are left out: experts and others that do not receive every token exactly
    once, and modules that the adapter replaces by a trained copy (`modules_to_save`).
    `sequences` are token ids, such as prompts with answers, of about `MAX_TOKENS` in total.
    `on_progress` is called with the number of processed sequences and that of all.

    Raises UnsupportedModelError if the base returns no hidden states.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper

    device, head = model.device, model.get_output_embeddings()
    names = {id(weight): name for name, weight in model.named_parameters()}
    modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    tokens = sum(map(len, sequences))
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    chosen = torch.empty(0)
    last: tuple[Tensor | None, Tensor] = (None, chosen)

    def keep(name: str, inputs: Tensor) -> None:
        nonlocal last
        rows = inputs.flatten(0, -2)  # some modules receive (batch * tokens, features)
        if len(rows) != len(chosen):
            return
        if inputs is not last[0]:  # modules with the same input share its copy
            last = (inputs, rows[chosen.to(rows.device)].detach().clone())
        found[name].append(last[1])

    with attached(model, adapter), torch.no_grad():
        backbone = model.base_model  # without the output layer, whose outputs would be large
        replaced = isinstance(model.get_output_embeddings(), AuxiliaryTrainingWrapper)
        hooks = [
            module.register_forward_pre_hook(lambda _, given, name=name: keep(name, given[0]))
            for name, module in modules.items()
            if module is not head
        ]
        try:
            for first in range(0, len(sequences), _BATCH):
                batch = [torch.tensor(ids) for ids in sequences[first : first + _BATCH]]
                ids = nn.utils.rnn.pad_sequence(batch, batch_first=True)
                lengths = torch.tensor([len(row) for row in batch])
                mask = torch.arange(ids.shape[1]) < lengths[:, None]
                drawn = torch.rand(ids.shape, generator=generator) < _INPUTS / tokens
                chosen = (mask & drawn).flatten().to(device)
                outputs = backbone(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device, torch.long),
                    use_cache=False,
                )
                hidden = getattr(outputs, "last_hidden_state", None)
                if hidden is None:
                    raise UnsupportedModelError(f"{type(model).__name__} returns no hidden states")
                for name, module in modules.items():
                    if module is head and not replaced:
                        keep(name, hidden)
                on_progress(min(first + _BATCH, len(sequences)), len(sequences))
        finally:
            last = (None, chosen)
            for hook in hooks:
                hook.remove()
    same: dict[tuple[int, ...], list[str]] = {}
    for name, parts in found.items():
        if parts:
            same.setdefault(tuple(map(id, parts)), []).append(name)
    joined: dict[str, Tensor] = {}
    for sharing in same.values():
        values = torch.cat(found[sharing[0]])
        for name in sharing:
            joined[name] = values
            found[name].clear()  # so that the inputs of one module only are in memory twice
    return {
        name: ModuleInputs(names[id(module.weight)], joined[name], module is head)
        for name, module in modules.items()
        if name in joined
    }
