"""Compensate an update of the base in a LoRA adapter, in closed form and without labels.

An update changes the weight of a linear module from W_old to W_new. The adapter was trained on the
outputs of W_old. A matrix C of low rank is added to the adapter so that W_new + C gives nearly the
outputs of W_old on inputs X of the module:

    C = U U^T (W_old - W_new),  U: the first left singular vectors of (W_old - W_new) X^T

No other C of this rank has a smaller error |(W_old - W_new - C) X^T| (Eckart and Young 1936). QERA
(Zhang et al. 2024) corrects the error of quantized weights in the same way. The inputs are those
that the adapter has on its old base.

C is part of the adapter: its LoRA matrices are joined with those of C, and modules that it did not
adapt get C alone. Linear modules are compensated, with the output layer. Changes of input
embeddings, norms and other weights are not.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from trans_peft.errors import AdapterError, UnsupportedModelError, listed
from trans_peft.transfer.load_adapter import attached
from trans_peft.transfer.peft_folder import CONFIG_NAME, WEIGHTS_NAME, read_peft_folder

__all__ = [
    "MAX_TOKENS",
    "Compensation",
    "ModuleInputs",
    "compensate",
    "module_inputs",
    "not_compensable",
]

MAX_TOKENS = 8_192
"""Tokens of sequences that are useful: more inputs hardly change the result."""

_INPUTS = 4_096
"""Inputs of each module that are kept, from random positions of the sequences."""

_BATCH = 16
_OVERSAMPLING, _ITERATIONS = 8, 4  # of the randomized SVD
_PREFIX = "base_model.model."
_CHANGED_FORM = (  # options under which the product is not scale * B A on every token
    "alora_invocation_tokens",
    "ensure_weight_tying",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


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


@dataclass(frozen=True)
class Compensation:
    """A compensated adapter.

    Attributes:
        folder: its PEFT folder.
        modules: number of modules whose change is compensated.
        explained: share of the squared change of a module's outputs that is compensated, on
            average.
        other_share: share of the squared change of all weights that is in other weights.
    """

    folder: Path
    modules: int
    explained: float
    other_share: float

    def __str__(self) -> str:
        return (
            f"{100 * self.explained:.0f} % of the change of {self.modules} linear modules "
            f"compensated, {100 * self.other_share:.0f} % of the change is in other weights"
        )


def not_compensable(folder: Path) -> str:
    """Return why an adapter cannot be compensated; empty if it can. DoRA and rsLoRA can."""
    found = read_peft_folder(folder)
    if found.peft_type != "LORA":
        return f"an adapter of the type {found.peft_type} has no low-rank product"
    options = [name for name in _CHANGED_FORM if found.config.get(name)]
    return f"the adapter has {', '.join(options)}" if options else ""


def module_inputs(
    model: PreTrainedModel, adapter: Path, sequences: Sequence[Sequence[int]]
) -> Mapping[str, ModuleInputs]:
    """Return inputs of the linear modules of a base with an adapter, by the names of the modules.

    Modules that do not receive every token once, such as experts, and modules of which the adapter
    has a trained copy (`modules_to_save`) are left out. `sequences` are token ids, such as prompts
    with answers, of about `MAX_TOKENS` in total.

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
            last = (inputs, rows[chosen].detach().clone())
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
        finally:
            last = (None, chosen)
            for hook in hooks:
                hook.remove()
    joined: dict[tuple[int, ...], Tensor] = {}
    inputs = {}
    for name, parts in found.items():
        shared = tuple(map(id, parts))
        if parts and shared not in joined:
            joined[shared] = torch.cat(parts)
        if parts:
            module = modules[name]
            weight = names[id(module.weight)]
            inputs[name] = ModuleInputs(weight, joined[shared], module is head)
    return inputs


def compensate(
    adapter: Path,
    weights: Iterable[tuple[str, Tensor, Tensor]],
    inputs: Mapping[str, ModuleInputs],
    rank: int,
    target: Path,
) -> Compensation:
    """Write an adapter for the new base whose changed modules are compensated.

    The rank of the written adapter is that of the given one plus `rank`, in every module. Modules
    that the adapter does not change use all of it for C.

    Args:
        adapter: PEFT folder of a LoRA adapter, with or without DoRA.
        weights: name, old value and new value of every tensor of the base, in float32
            (`trans_peft.bases.drift.weight_pairs`).
        inputs: inputs of the modules, from `module_inputs`.
        rank: rank of C in modules that the adapter changes.
        target: a new folder.

    Raises:
        AdapterError: the adapter is not compensable, no linear module has changed, or the outputs
            of one are not finite.
    """
    if reason := not_compensable(adapter):
        raise AdapterError(f"{adapter} cannot be compensated: {reason}", expected="LoRA or DoRA")
    config = dict(read_peft_folder(adapter).config)
    tensors = load_file(adapter / WEIGHTS_NAME)
    total = rank + max(
        (tensor.shape[0] for key, tensor in tensors.items() if key.endswith("lora_A.weight")),
        default=0,
    )
    written = {key: tensor for key, tensor in tensors.items() if ".lora_" not in key}
    names: list[str] = []
    shares: list[float] = []
    whole = other = 0.0
    generator = torch.Generator().manual_seed(0)
    modules = defaultdict(list)
    for name, found in inputs.items():
        modules[found.weight].append(name)

    def can_be_new(weight: Tensor) -> bool:
        # DoRA divides by the norm of each row, and rows of unused tokens can be 0.
        return not config.get("use_dora") or bool(weight.any(dim=1).all())

    for weight, old, new in weights:
        change = old - new
        size = change.square().sum().item()
        whole += size
        here = [
            name
            for name in modules.get(weight, ())
            if f"{_PREFIX}{name}.lora_A.weight" in tensors or (size and can_be_new(new))
        ]
        other += 0.0 if here else size
        for name in here:
            key = f"{_PREFIX}{name}."
            a, b = _product(tensors, key, config, old)
            exact = a.shape[0]
            if size:
                basis, share = _basis(change, inputs[name].values, total - exact)
                shares.append(share)
                rows = basis.T @ change
                balance = rows.norm(dim=1).clamp(min=torch.finfo(rows.dtype).tiny).sqrt()
                a = torch.cat([a, rows / balance[:, None]])
                b = torch.cat([b, basis * balance], dim=1)
            a, b = _padded(a, b, total, generator)
            names.append(name)
            written |= {f"{key}lora_A.weight": a, f"{key}lora_B.weight": b}
            if config.get("use_dora"):
                magnitude = f"{key}lora_magnitude_vector"
                written[magnitude] = _magnitude(
                    tensors.get(magnitude), old + b[:, :exact] @ a[:exact], new + b @ a
                )
    lost = [key for key in tensors if ".lora_" in key and key not in written]
    if lost:
        raise AdapterError(
            f"{adapter} cannot be compensated: it adapts other modules than linear ones that "
            f"receive every token: {listed(lost)}"
        )
    if not shares:
        raise AdapterError(f"{adapter} cannot be compensated: the update changes no linear module")
    shutil.copytree(adapter, target)
    save_file({key: tensor.contiguous() for key, tensor in written.items()}, target / WEIGHTS_NAME)
    config |= {
        "r": total, "lora_alpha": total, "use_rslora": False,
        "rank_pattern": {}, "alpha_pattern": {}, "target_modules": sorted(names),
        "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None,
        "init_lora_weights": True,  # the given one may not allow this rank
    }  # fmt: skip
    (target / CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return Compensation(target, len(shares), sum(shares) / len(shares), other / whole)


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """Return the factor of B A in a module, as PEFT computes it."""
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    alphas = config.get("alpha_pattern") or {}
    default = config.get("lora_alpha", LoraConfig.lora_alpha)
    alpha = float(alphas.get(get_pattern_key(alphas.keys(), name), default))
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def _product(
    tensors: Mapping[str, Tensor], key: str, config: Mapping[str, Any], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return A and scale * B of a module, of rank 0 if the adapter does not change it."""
    if f"{key}lora_A.weight" not in tensors:
        return weight.new_empty(0, weight.shape[1]), weight.new_empty(weight.shape[0], 0)
    a, b = (tensors[f"{key}lora_{side}.weight"].float() for side in "AB")
    name = key.removeprefix(_PREFIX).removesuffix(".")
    return a, b * _scale(config, name, a.shape[0])


def _basis(change: Tensor, inputs: Tensor, rank: int) -> tuple[Tensor, float]:
    """Return U (out_features, at most rank), and the share |U U^T Y|^2 / |Y|^2.

    Y = change @ inputs.T are the changes of the outputs. Inputs X = Q R can be replaced by R: the
    left singular vectors and the norms of Y stay the same. For an output layer, Y is then smaller.
    """
    if change.shape[0] > inputs.shape[0] > inputs.shape[1]:
        inputs = torch.linalg.qr(inputs.float(), mode="r").R
    outputs = change @ inputs.to(change).T
    if not outputs.isfinite().all():
        raise AdapterError(
            "the change of the outputs of a linear module is not finite",
            expected="finite weights in both bases, and finite inputs in the suite's dtype",
        )
    rank = min(rank, *outputs.shape)
    with torch.random.fork_rng(devices=[]):  # the SVD draws from torch's global generator
        torch.manual_seed(0)
        size = min(rank + _OVERSAMPLING, *outputs.shape)
        basis = torch.svd_lowrank(outputs, q=size, niter=_ITERATIONS)[0][:, :rank]
    whole = outputs.square().sum().item()
    return basis, (basis.T @ outputs).square().sum().item() / whole if whole else 1.0


def _padded(a: Tensor, b: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return A and B of this rank with the same product, such as PEFT initializes new ones."""
    missing, width = rank - a.shape[0], a.shape[1]
    drawn = (2 * torch.rand(missing, width, generator=generator) - 1) / sqrt(width)
    return torch.cat([a, drawn]), torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)


def _magnitude(old_magnitude: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    """Return DoRA's magnitudes, with which the factor of each row is that on the old base.

    `old` and `new` are the weights with the products of the adapter. An adapter without a magnitude
    for the module has the factor 1.
    """
    norms = new.norm(dim=1)
    return norms if old_magnitude is None else old_magnitude.float() / old.norm(dim=1) * norms
