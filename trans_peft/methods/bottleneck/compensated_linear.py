"""The PEFT layer of a linear module that a bottleneck adapter compensates for an update."""

# mypy has no types for PEFT and infers submodules for the attributes of its mixin.
# mypy: disable-error-code="operator, union-attr"

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

__all__ = ["CompensatedLinear"]


class CompensatedLinear(nn.Module, BaseTunerLayer):
    """A linear module W with compensations: W x becomes W x + B A x.

    A is (rank, in_features) and B (out_features, rank). `trans_peft.transfer.compensation` computes
    them. New ones change nothing, because B starts at zero.
    """

    adapter_layer_names = ("bottleneck_compensation_A", "bottleneck_compensation_B")

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_compensation_A = nn.ModuleDict()
        self.bottleneck_compensation_B = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    def update_layer(self, adapter_name: str, rank: int) -> None:
        """Add matrices of this rank on the device and in the dtype of the module."""
        base = self.get_base_layer()
        down = nn.Linear(base.in_features, rank, bias=False)
        up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(up.weight)
        self.bottleneck_compensation_A[adapter_name] = down
        self.bottleneck_compensation_B[adapter_name] = up
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise NotImplementedError, as `BottleneckLayer` does."""
        raise NotImplementedError("a bottleneck adapter is not linear and cannot be merged")

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return W x + B A x of shape (..., out_features)."""
        output = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return output
        for name in self.active_adapters:
            if name in self.bottleneck_compensation_A:
                down = self.bottleneck_compensation_A[name]
                low = down(self._cast_input_dtype(x, down.weight.dtype))
                output = output + self.bottleneck_compensation_B[name](low).to(output.dtype)
        return output

    def __repr__(self) -> str:
        return "bottleneck." + super().__repr__()
