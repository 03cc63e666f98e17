"""The effect probe: does the adapter change what the model says at all?

An adapter can be loaded without an error and do nothing (its modules were skipped, its scale is 0,
its weights are zeros). Evaluating it would then measure the bare base under the adapter's name.
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
    """Return the largest change of a logit that the active adapter makes on a few built-in prompts.

    Each prompt goes through the same model with the adapter on and off, so an adapter that does
    nothing gives exactly 0. (In half precision a method that rebuilds the weight, as DoRA does,
    shows rounding instead; the gate then finds it no better than the bare base.) AdapterError if
    the adapter makes logits that are not finite; UnsupportedModelError if the base alone does.
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
            "the base alone answers the probe with logits that are not finite",
            found=unusable,
            do="load the base in float32, or check its files",
        )
    if unusable := _not_finite(adapted):
        raise AdapterError(
            "the adapter makes logits that are not finite",
            found=unusable,
            do="check its weights, and the dtype that the base was loaded in",
        )
    # Prompt learning puts virtual tokens in front: compare the prompts' own positions.
    changes = (a[:, -b.shape[1] :] - b for a, b in zip(adapted, bare, strict=True))
    return Effect(max_logit_change=max(change.abs().max().item() for change in changes))


def _not_finite(logits: "list[torch.Tensor]") -> str:
    """Say how many are not, where some are not."""
    bad = sum(int((~one.isfinite()).sum()) for one in logits)
    return f"{bad} of {sum(one.numel() for one in logits)}" if bad else ""
