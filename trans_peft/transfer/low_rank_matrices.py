"""How an adapter stores matrices of low rank for linear modules, by its type.

LoRA has them itself, and a bottleneck adapter has those of earlier compensations
(`trans_peft.methods.bottleneck.CompensatedLinear`). Modules have their names in the base.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from trans_peft.transfer.peft_folder import WEIGHTS_NAME, read_peft_folder

__all__ = ["LoraMatrices", "low_rank_matrices", "not_compensable"]

_PREFIX = "base_model.model."
_COMPENSATION = "bottleneck_compensation_"
_DOWN = ("lora_A.weight", f"{_COMPENSATION}A.weight")
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


def not_compensable(folder: Path) -> str:
    """Return why matrices cannot be added to an adapter; empty if they can. DoRA has them too."""
    found = read_peft_folder(folder)
    if found.peft_type not in _TYPES:
        return f"PEFT adds no matrices of low rank to an adapter of the type {found.peft_type}"
    options = [name for name in _CHANGED_FORM if found.config.get(name)]
    return f"the adapter has {', '.join(options)}" if options else ""


def low_rank_matrices(folder: Path) -> "LoraMatrices":
    """Read the adapter of a PEFT folder that `not_compensable` does not refuse."""
    found = read_peft_folder(folder)
    return _TYPES[found.peft_type](found.config, load_file(folder / WEIGHTS_NAME))


@dataclass(frozen=True)
class LoraMatrices:
    """The config and the tensors of a LoRA adapter."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def is_dora(self) -> bool:
        """Whether the adapter is a DoRA adapter."""
        return bool(self.config.get("use_dora"))

    @property
    def rank(self) -> int:
        """The largest rank of a module; 0 if there are no matrices."""
        return max(
            (t.shape[0] for key, t in self.tensors.items() if key.endswith(_DOWN)), default=0
        )

    def key(self, name: str, side: str) -> str:
        """Return the name of the tensor of a module's matrix A or B."""
        return f"{_PREFIX}{name}.lora_{side}.weight"

    def is_matrix(self, key: str) -> bool:
        """Whether a tensor belongs to the product of a module, as DoRA's magnitudes do."""
        return ".lora_" in key

    def is_written(self, name: str, new: Tensor, is_changed: bool) -> bool:
        """Whether the compensated adapter has matrices for a module with this new weight.

        DoRA divides by the norm of each row, and rows of unused tokens can be 0.
        """
        if self.key(name, "A") in self.tensors:
            return True
        return is_changed and not (self.is_dora and not new.any(dim=1).all())

    def product(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and scale * B of a module, of rank 0 if it has no matrices."""
        if self.key(name, "A") not in self.tensors:
            return weight.new_empty(0, weight.shape[1]), weight.new_empty(weight.shape[0], 0)
        a, b = (self.tensors[self.key(name, side)].float() for side in "AB")
        return a, b * self._scale(name, a.shape[0])

    def magnitude_key(self, name: str) -> str:
        """Return the name of the tensor of DoRA's magnitudes of a module."""
        return f"{_PREFIX}{name}.lora_magnitude_vector"

    def magnitude(self, name: str, before: Tensor, after: Tensor) -> Tensor:
        """Return DoRA's magnitudes, with which the factor of each row is that on the old base.

        `before` and `after` are the weights with the products of the two adapters. A module without
        a magnitude has the factor 1.
        """
        known = self.tensors.get(self.magnitude_key(name))
        norms = after.norm(dim=1)
        return norms if known is None else known.float() / before.norm(dim=1) * norms

    def config_at(self, rank: int, names: Sequence[str]) -> dict[str, Any]:
        """Return the config of an adapter with one rank and the scale 1 in these modules."""
        return {
            **self.config,
            "r": rank, "lora_alpha": rank, "use_rslora": False,
            "rank_pattern": {}, "alpha_pattern": {}, "target_modules": sorted(names),
            "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None,
            "init_lora_weights": True,  # the given one may not allow this rank
        }  # fmt: skip

    def _scale(self, name: str, rank: int) -> float:
        """Return the factor of B A in a module, as PEFT computes it."""
        from peft import LoraConfig
        from peft.utils.other import get_pattern_key

        alphas = self.config.get("alpha_pattern") or {}
        default = self.config.get("lora_alpha", LoraConfig.lora_alpha)
        alpha = float(alphas.get(get_pattern_key(alphas.keys(), name), default))
        return alpha / (sqrt(rank) if self.config.get("use_rslora") else rank)


class BottleneckMatrices(LoraMatrices):
    """A bottleneck adapter. Its matrices are those of earlier compensations only."""

    def key(self, name: str, side: str) -> str:
        for sub_layer in self._sub_layers:
            if f"{name}.".startswith(f"{sub_layer}."):
                name = f"{sub_layer}.base_layer{name.removeprefix(sub_layer)}"
        return f"{_PREFIX}{name}.{_COMPENSATION}{side}.weight"

    def is_matrix(self, key: str) -> bool:
        return f".{_COMPENSATION}" in key

    def config_at(self, rank: int, names: Sequence[str]) -> dict[str, Any]:
        return {**self.config, "compensation_rank": rank, "compensated_modules": sorted(names)}

    def _scale(self, name: str, rank: int) -> float:
        return 1.0

    @property
    def _sub_layers(self) -> Sequence[str]:
        """The modules that the adapter follows. In the names of tensors they are wrapped."""
        down = ".bottleneck_down.weight"
        names = [key.removesuffix(down) for key in self.tensors if key.endswith(down)]
        return [name.removeprefix(_PREFIX) for name in names]


_TYPES: Mapping[str, type[LoraMatrices]] = {"LORA": LoraMatrices, "BOTTLENECK": BottleneckMatrices}
