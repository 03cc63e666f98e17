"""Probe whether an adapter changes the logits of its base.

An adapter can load without an error and have no effect: its modules were skipped, its scale is 0,
or its weights are zero. An evaluation would then measure the bare base.
"""

from typing import TYPE_CHECKING, Any

from trans_peft.domain.outcome import Effect
from trans_peft.errors import AdapterError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

__all__ = ["PROBE_PROMPTS", "probe_effect"]

PROBE_PROMPTS = (
    "The capital of France is",
    "Question: If 3 apples cost 6 dollars, what do 7 apples cost?\nAnswer:",
    "def add(a, b):\n    return",
    "Пример: 例えば、",
)


def probe_effect(peft_model: "PeftModel", tokenizer: Any) -> Effect:
    """Return the largest change of a logit that the active adapter causes on `PROBE_PROMPTS`.

    The same model computes each prompt with the adapter enabled and disabled, so an adapter without
    an effect returns exactly 0. Methods that recompute the weight, such as DoRA, can return a
    rounding error instead in half precision.

    Raises:
        AdapterError: logits with the adapter are not finite.
        UnsupportedModelError: logits of the base alone are not finite.
    """
    import torch

    was_training = peft_model.training
    peft_model.eval()
    try:
        with torch.no_grad():
            inputs = [
                tokenizer(prompt, return_tensors="pt")["input_ids"].to(peft_model.device)
                for prompt in PROBE_PROMPTS
            ]

            def logits() -> "list[torch.Tensor]":
                return [
                    peft_model(input_ids=tokens, use_cache=False).logits.float()
                    for tokens in inputs
                ]

            adapted = logits()
            with peft_model.disable_adapter():
                bare = logits()
    finally:
        peft_model.train(was_training)
    if unusable := _not_finite(bare):
        raise UnsupportedModelError(
            "logits of the bare base are not finite",
            found=unusable,
            do="load the base in float32, or check its files",
        )
    if unusable := _not_finite(adapted):
        raise AdapterError(
            "logits with the adapter are not finite",
            found=unusable,
            do="check its weights, and the dtype that the base was loaded in",
        )
    # Prompt learning prepends virtual tokens, whose positions are not compared.
    changes = (a[:, -b.shape[1] :] - b for a, b in zip(adapted, bare, strict=True))
    return Effect(max_logit_change=max(change.abs().max().item() for change in changes))


def _not_finite(logits: "list[torch.Tensor]") -> str:
    """Return "N of M" for the logits that are not finite, or "" if all are finite."""
    bad = sum(int((~one.isfinite()).sum()) for one in logits)
    return f"{bad} of {sum(one.numel() for one in logits)}" if bad else ""
