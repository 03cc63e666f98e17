"""The PEFT tuner of bottleneck adapters."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from trans_peft.methods.bottleneck.compensated_linear import CompensatedLinear
from trans_peft.methods.bottleneck.config import BottleneckConfig
from trans_peft.methods.bottleneck.layer import BottleneckLayer

__all__ = ["BottleneckModel"]

_LLAMA_LIKE = ["self_attn", "mlp"]


class BottleneckModel(BaseTuner):
    """Wraps every targeted sub-layer in a `BottleneckLayer`, as PEFT's own tuners do.

    The output of a target must be what is added to the residual stream: an attention, an FFN, or
    the last projection of one. All adapters of one model must wrap the same sub-layers wherever one
    adapts or compensates a module inside of them: the names of its tensors contain the wrappers.
    """

    prefix = "bottleneck_"
    tuner_layer_cls = BaseTunerLayer
    target_module_mapping = {  # noqa: RUF012 - PEFT reads it as a class attribute
        "cohere": _LLAMA_LIKE,
        "falcon": ["self_attention", "mlp"],
        "gemma": _LLAMA_LIKE,
        "gemma2": _LLAMA_LIKE,
        "gemma3_text": _LLAMA_LIKE,
        "gpt2": ["attn", "mlp"],
        "gpt_neox": ["attention", "mlp"],
        "internlm3": _LLAMA_LIKE,
        "llama": _LLAMA_LIKE,
        "mistral": _LLAMA_LIKE,
        "mixtral": _LLAMA_LIKE,
        "olmo2": _LLAMA_LIKE,
        "opt": ["self_attn", "fc2"],
        "phi3": _LLAMA_LIKE,
        "qwen2": _LLAMA_LIKE,
        "qwen2_moe": _LLAMA_LIKE,
        "qwen3": _LLAMA_LIKE,
    }

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Wrap the sub-layers, and the linear modules that the adapter compensates.

        ValueError if the base lacks one of these modules, if one target is inside another, or if
        another adapter of the model wraps other sub-layers around them.
        """
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except AttributeError as error:  # PEFT looks for a module of a sub-layer that is wrapped
            if BottleneckLayer.__name__ not in str(error):
                raise
            raise ValueError(
                "target_modules has a sub-layer and a module inside it; name one of them"
            ) from error
        config = self.peft_config[adapter_name]
        assert isinstance(config, BottleneckConfig)
        for name in config.compensated_modules or ():
            layer = _compensated_linear(model, name)
            others = [(weight, weight.requires_grad) for weight in layer.parameters()]
            layer.update_layer(adapter_name, config.compensation_rank)
            layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)  # type: ignore[operator]
            for weight, is_trained in others:
                weight.requires_grad_(is_trained)
        self._check_wrappers(model, adapter_name)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """Raise ValueError for `adapter_names`, which PEFT would ignore."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "bottleneck adapters cannot be selected for each row of a batch (adapter_names); "
                "call set_adapter and pass the rows of one adapter"
            )
        return nullcontext()

    def _create_and_replace(  # noqa: PLR0913  the signature is PEFT's
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, BottleneckConfig)
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        hidden_size = self.model.config.get_text_config().hidden_size
        layer = BottleneckLayer(target, hidden_size, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new: Any, child: Any) -> None:
        setattr(parent, child_name, new)

    def _check_wrappers(self, model: nn.Module, new: str) -> None:
        """Raise ValueError if an adapter needs a module inside a wrapper that is not its own.

        The names of its tensors lack the wrapper, so PEFT would not load them. Targets of the new
        adapter inside of wrappers were skipped by PEFT.
        """
        for name, outer in model.named_modules():
            if not isinstance(outer, BottleneckLayer):
                continue
            wrapping = _adapters(outer)
            for path, inner in outer.base_layer.named_modules():
                needing = _adapters(inner)
                plain = f"{name}.{path}".strip(".").replace(".base_layer", "")
                if path and self._check_target_module_exists(self.peft_config[new], plain):
                    needing = needing | {new}
                if foreign := sorted(needing - wrapping):
                    raise ValueError(
                        f"target_modules and compensated_modules of the adapters {foreign} do not "
                        f"fit into one model with those of {sorted(wrapping)}, which wrap {name} "
                        f"around {plain}; load them on separate copies of the base"
                    )


def _adapters(module: nn.Module) -> set[str]:
    """Return the names of the adapters that have tensors in a module."""
    if isinstance(module, BottleneckLayer):
        return set(module.bottleneck_down)
    return set(module.bottleneck_compensation_A) if isinstance(module, CompensatedLinear) else set()


def _compensated_linear(model: nn.Module, name: str) -> CompensatedLinear:
    """Return the layer around the linear module with this name in the base.

    The sub-layers on the way to it are wrapped already. ValueError if the base has no such module.
    """
    parent, child, module = model, "", model
    for part in name.split("."):
        parent, child, module = module, part, getattr(module, part, None)  # type: ignore[assignment]
        if isinstance(module, BottleneckLayer):
            parent, child, module = module, "base_layer", module.base_layer
    if isinstance(module, CompensatedLinear):
        return module
    if not isinstance(module, nn.Linear):
        raise ValueError(f"compensated_modules: the base has no linear module {name!r}")
    layer = CompensatedLinear(module)
    setattr(parent, child, layer)
    return layer
