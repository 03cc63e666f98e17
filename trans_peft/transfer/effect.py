"""The effect probe: does the adapter change what the model says at all?

An adapter can be loaded without an error and do nothing (its modules were skipped, its scale is 0,
its weights are zeros). Evaluating it would then measure the bare base under the adapter's name.
"""

from typing import TYPE_CHECKING, Any

from trans_peft.domain.outcome import Effect
from trans_peft.errors import AdapterError, UnsupportedModelError

if TYPE_CHECKING:
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

    largest = 0.0
    was_training = peft_model.training
    peft_model.eval()
    try:
        with torch.no_grad():
            for prompt in PROBE_PROMPTS:
                tokens = tokenizer(prompt, return_tensors="pt")["input_ids"].to(peft_model.device)
                adapted = peft_model(input_ids=tokens, use_cache=False).logits.float()
                with peft_model.disable_adapter():
                    bare = peft_model(input_ids=tokens, use_cache=False).logits.float()
                if not torch.isfinite(bare).all():
                    raise UnsupportedModelError(
                        "the base alone answers the probe with logits that are not finite",
                        found=f"{int((~torch.isfinite(bare)).sum())} of {bare.numel()}",
                        do="load the base in float32, or check its files",
                    )
                if not torch.isfinite(adapted).all():
                    raise AdapterError(
                        "the adapter makes logits that are not finite",
                        found=f"{int((~torch.isfinite(adapted)).sum())} of {adapted.numel()}",
                        do="check its weights, and the dtype that the base was loaded in",
                    )
                # Prompt learning puts virtual tokens in front: compare the prompt's own positions.
                change = adapted[:, -bare.shape[1] :] - bare
                largest = max(largest, change.abs().max().item())
    finally:
        peft_model.train(was_training)
    return Effect(max_logit_change=largest)
