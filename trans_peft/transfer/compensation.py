"""Compensate an update of the base in an adapter, in closed form and without labels.

An update changes the weight of a linear module from W_old to W_new. The adapter was trained on the
outputs of W_old. A matrix C of low rank is added to the adapter so that W_new + C gives nearly the
outputs of W_old on inputs X of the module:

    C = U U^T (W_old - W_new),  U: the first left singular vectors of (W_old - W_new) X^T

No other C of this rank has a smaller error |(W_old - W_new - C) X^T| (Eckart and Young 1936). QERA
(Zhang et al. 2024) corrects the error of quantized weights in the same way. The inputs are those
that the adapter has on its old base.

C is part of the adapter: its LoRA matrices are joined with those of C, and modules that it did not
adapt get C alone. A bottleneck adapter has the matrices of C beside its own
(`trans_peft.methods.bottleneck.CompensatedLinear`). Linear modules are compensated, with the output
layer. Changes of input embeddings, norms and other weights are not.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite, sqrt
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from trans_peft.errors import AdapterError, listed
from trans_peft.transfer.low_rank_matrices import low_rank_matrices, not_compensable
from trans_peft.transfer.module_inputs import ModuleInputs
from trans_peft.transfer.peft_folder import CONFIG_NAME, WEIGHTS_NAME

__all__ = ["Compensation", "compensate"]

_OVERSAMPLING, _ITERATIONS = 8, 5  # of the subspace iteration


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


def compensate(
    adapter: Path,
    weights: Iterable[tuple[str, Tensor, Tensor]],
    inputs: Mapping[str, ModuleInputs],
    rank: int,
    target: Path,
    *,
    output_layer: bool = True,
) -> Compensation:
    """Write an adapter for the new base whose changed modules are compensated.

    The rank of the written adapter is that of the given one plus `rank`, in every module. Modules
    that the adapter does not change use all of it for C. A `rank` above the largest number of
    inputs of a module counts as that number, at which C is exact.

    Args:
        adapter: PEFT folder of a LoRA adapter, with or without DoRA, or of a bottleneck adapter.
        weights: name, old value and new value of every tensor of the base, in float32
            (`trans_peft.bases.drift.weight_pairs`).
        inputs: inputs of the modules, from `module_inputs`.
        rank: rank of C in modules that the adapter changes.
        target: a new folder.
        output_layer: whether the output layer is compensated even if the adapter does not change
            it.

    Raises:
        AdapterError: the adapter is not compensable, no linear module has changed, or the change of
            a weight or of a module's outputs is not finite.
    """
    if reason := not_compensable(adapter):
        raise AdapterError(
            f"{adapter} cannot be compensated: {reason}",
            expected="LoRA, DoRA or a bottleneck adapter",
        )
    source = low_rank_matrices(adapter)
    total = source.rank + min(
        rank, max((one.values.shape[1] for one in inputs.values()), default=0)
    )
    modules = defaultdict(list)
    for name, found in inputs.items():
        if output_layer or not found.of_output_layer or source.key(name, "A") in source.tensors:
            modules[found.weight].append(name)
    written = {key: tensor for key, tensor in source.tensors.items() if not source.is_matrix(key)}
    names: list[str] = []
    elsewhere: list[str] = []
    shares: list[float] = []
    whole = other = 0.0
    generator = torch.Generator().manual_seed(0)
    # Modules with the same inputs follow each other: keys and queries, gates and ups.
    moment = lru_cache(maxsize=2)(_SecondMoment)
    for weight, old, new in weights:
        size = (old - new).square().sum().item()
        _check_finite(size, f"the change of the weight {weight}")
        here = [name for name in modules[weight] if source.is_written(name, new, bool(size))]
        whole += size
        if size and not here:
            other += size
            elsewhere.append(weight)
        for name in here:
            a, b = source.product(name, old)
            exact = a.shape[0]
            if size:
                more_a, more_b, share = _correction(
                    old - new, moment(inputs[name].values), total - exact, name
                )
                a, b = torch.cat([a, more_a]), torch.cat([b, more_b], dim=1)
                shares.append(share)
            a, b = _padded(a, b, total, generator)
            names.append(name)
            written |= {source.key(name, "A"): a, source.key(name, "B"): b}
            if source.is_dora:
                before, after = old + b[:, :exact] @ a[:exact], new + b @ a
                written[source.magnitude_key(name)] = source.magnitude(name, before, after)
    lost = [key for key in source.tensors if source.is_matrix(key) and key not in written]
    if lost:
        raise AdapterError(
            f"{adapter} cannot be compensated: it adapts other modules than linear ones that "
            f"receive every token: {listed(lost)}"
        )
    if not shares:
        raise AdapterError(
            f"{adapter} cannot be compensated: the update changes no linear module",
            expected="a changed weight of a torch.nn.Linear that receives every token",
            found=f"changes of {listed(sorted(elsewhere))}" if elsewhere else "no change",
        )
    shutil.copytree(adapter, target)
    save_file({key: tensor.contiguous() for key, tensor in written.items()}, target / WEIGHTS_NAME)
    config = source.config_at(total, names)
    (target / CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return Compensation(target, len(shares), sum(shares) / len(shares), other / whole)


class _SecondMoment:
    """S = X^T X of inputs X (n, in_features), which are kept instead if they are fewer."""

    def __init__(self, inputs: Tensor) -> None:
        inputs = inputs.to("cpu", torch.float32)  # where the weights of the bases are
        n, width = inputs.shape
        self._inputs = None if n > width else inputs
        self._product = inputs.T @ inputs if n > width else None

    def __rmatmul__(self, left: Tensor) -> Tensor:
        """Return `left` S."""
        if self._product is not None:
            return left @ self._product
        assert self._inputs is not None
        return left @ self._inputs.T @ self._inputs


def _correction(
    change: Tensor, moment: _SecondMoment, rank: int, name: str
) -> tuple[Tensor, Tensor, float]:
    """Return A and B with B A = U U^T change, and the share |U U^T Y|^2 / |Y|^2, of a module.

    Y = change @ X^T are the changes of the outputs, and U their first left singular vectors. These
    are eigenvectors of Y Y^T = change S change^T, which is never formed: subspace iteration
    (Halko, Martinsson and Tropp 2011) multiplies few vectors by it.
    """
    weighted = change @ moment
    whole = (weighted * change).sum().item()
    _check_finite(whole, f"the change of the outputs of {name}")
    rank = min(rank, *change.shape)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(
        change.shape[0], min(rank + _OVERSAMPLING, *change.shape), generator=generator
    )
    basis = torch.linalg.qr(drawn).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(weighted @ (change.T @ basis)).Q
    values, vectors = torch.linalg.eigh((basis.T @ weighted) @ (change.T @ basis))
    basis = basis @ vectors[:, -rank:]
    share = values[-rank:].sum().item() / whole if whole else 1.0
    rows = basis.T @ change
    balance = rows.norm(dim=1).clamp(min=torch.finfo(rows.dtype).tiny).sqrt()
    return rows / balance[:, None], basis * balance, share


def _check_finite(value: float, subject: str) -> None:
    if not isfinite(value):
        raise AdapterError(
            f"{subject} is not finite",
            expected="finite weights in both bases, and finite inputs in the suite's dtype",
        )


def _padded(a: Tensor, b: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return A and B of this rank with the same product, such as PEFT initializes new ones."""
    missing, width = rank - a.shape[0], a.shape[1]
    drawn = (2 * torch.rand(missing, width, generator=generator) - 1) / sqrt(width)
    return torch.cat([a, drawn]), torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)
