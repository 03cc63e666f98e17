"""The PEFT layer of a bottleneck adapter."""

# mypy has no types for PEFT and infers submodules for the attributes of its mixin.
# mypy: disable-error-code="operator, union-attr"

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.activations import ACT2FN

from trans_peft.methods.bottleneck.compensated_linear import CompensatedLinear
from trans_peft.methods.bottleneck.config import BottleneckConfig

__all__ = ["BottleneckLayer"]


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A sub-layer followed by bottleneck adapters: h (..., d) becomes h + W_up f(W_down h).

    h is the output of the sub-layer, or the first element if that is a tuple (attention). The
    adapter has no biases, so after an output of zeros it adds nothing. It is not linear and
    therefore cannot be merged.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_non_linearity",)

    def __init__(
        self, base_layer: nn.Module, hidden_size: int, adapter_name: str, config: BottleneckConfig
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.hidden_size = hidden_size
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_non_linearity: dict[str, nn.Module] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self.update_layer(adapter_name, config)
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter on the device and in the dtype of the sub-layer."""
        down = nn.Linear(self.hidden_size, config.bottleneck_dim, bias=False)
        up = nn.Linear(config.bottleneck_dim, self.hidden_size, bias=False)
        if config.init_bottleneck_weights:
            nn.init.zeros_(up.weight)
        self.bottleneck_down[adapter_name] = down
        self.bottleneck_up[adapter_name] = up
        self.bottleneck_non_linearity[adapter_name] = ACT2FN[config.non_linearity]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        """Return the device and the floating-point dtype of the sub-layer's weights."""
        device = None
        for parameter in base_layer.parameters():
            device = parameter.device
            if parameter.dtype.is_floating_point:
                return device, parameter.dtype
        return device, None  # every weight is quantized

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise NotImplementedError: a bottleneck adapter is not linear."""
        raise NotImplementedError(
            "a bottleneck adapter is not linear and cannot be merged; "
            "keep it, or remove it with unload()"
        )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the sub-layer of the base without its `CompensatedLinear`, for PEFT's `unload`."""
        if merge:
            self.merge(safe_merge, adapter_names)
        for parent in self.modules():
            for child, module in list(parent.named_children()):
                if isinstance(module, CompensatedLinear):
                    setattr(parent, child, module.base_layer)
        return self.base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the sub-layer with h replaced by h + W_up f(W_down h)."""
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                hidden = hidden + self._adapted(name, hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _adapted(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        down, up = self.bottleneck_down[name], self.bottleneck_up[name]
        x = self._cast_input_dtype(hidden, down.weight.dtype)
        return up(self.bottleneck_non_linearity[name](down(x))).to(hidden.dtype)

    def __repr__(self) -> str:
        return "bottleneck." + super().__repr__()
