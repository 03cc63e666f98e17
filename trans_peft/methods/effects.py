"""Options whose effect depends on the model: found by looking at the adapter that PEFT built."""

from collections.abc import Iterator, Mapping
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

__all__ = ["unused_on_model"]


def unused_on_model(peft_model: PeftModel, peft_type: str, options: Mapping[str, Any]) -> list[str]:
    """Return a problem for each option that has no effect on this model's modules.

    `peft_model` has the adapter that PEFT built from `options`.
    """
    check = {"BOFT": _boft, "GLORA": _glora, "HIRA": _dropout, "LOKR": _lokr, "LORA": _dropout}
    return [*check[peft_type](peft_model, options)] if peft_type in check else []


def _boft(peft_model: PeftModel, options: Mapping[str, Any]) -> Iterator[str]:
    """PEFT replaces int(boft_dropout * blocks) blocks of a layer by the identity."""
    blocks = [weight.shape[1] for name, weight in peft_model.named_parameters() if "boft_R" in name]
    dropout = options.get("boft_dropout", 0)
    if dropout and blocks and int(dropout * max(blocks)) == 0:
        yield (
            f"boft_dropout must be at least 1 / {max(blocks)}, the number of blocks, "
            f"not {dropout!r}"
        )


def _dropout(peft_model: PeftModel, options: Mapping[str, Any]) -> Iterator[str]:
    """PEFT applies no dropout to the indices that an embedding receives."""
    layers = [module for module in peft_model.modules() if isinstance(module, BaseTunerLayer)]
    embeddings = [isinstance(layer.get_base_layer(), nn.Embedding) for layer in layers]
    if embeddings and all(embeddings):
        for name in ("lora_dropout", "hira_dropout"):
            if options.get(name):
                yield f"{name} has no effect on embeddings, and all targets are embeddings"


def _glora(peft_model: PeftModel, options: Mapping[str, Any]) -> Iterator[str]:
    """GLoRA's C, D and E change biases; its A and B have a rank only as `lora`."""
    layers = [module for module in peft_model.modules() if isinstance(module, BaseTunerLayer)]
    has_bias = any(getattr(layer.get_base_layer(), "bias", None) is not None for layer in layers)
    if not has_bias:
        for name in ("config_C", "config_D_E"):
            if name in options:
                yield f"{name} has no effect: no targeted module has a bias"
    ranked = [options.get("config_A_B", "lora")]
    ranked += [options.get("config_C", "lora")] if has_bias else []
    if "r" in options and "lora" not in ranked:
        yield "r has no effect: no path of the adapter is 'lora'"


def _lokr(peft_model: PeftModel, options: Mapping[str, Any]) -> Iterator[str]:
    if options.get("decompose_both") and not any(
        "lokr_w1_a" in name for name, _ in peft_model.named_parameters()
    ):
        yield "decompose_both has no effect: r is too large for the smaller factor"
