"""Predict the loss of an adapter on a new base without running it there.

Theorem 1 of the paper bounds the loss by the change of the FFNs, which is the same for every
adapter. Three figures differ between adapters. They use LoRA's A and B (D = scale * B A on a weight
W), the weights of both bases, and the inputs x of W in the bare bases on the same prompts:

    weights   |P dW Q| / |P W Q|, with P and Q the projections on the column space of B and the row
              space of A: the change of the weight in the subspaces of the adapter (0 if W did not
              change)
    inputs    |D (x_new - x_old)| / |D x_old|: the change of the adapter's output by that of its
              inputs
    size      |D x_old| / |W x_old|: the relative norm of the adapter's output (independent of the
              update)

Each norm is the root of a sum of squares over all modules, and over positions for inputs.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["NAMES", "Activations", "record_activations", "risks"]

NAMES = ("weights", "inputs", "size")

Activations = Mapping[str, "Tensor"]
"""Inputs of each attention projection (positions, d_in), by the module's name."""

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
_POSITIONS = 8  # the last positions of each prompt


def record_activations(model: "nn.Module", prompts: Sequence[Sequence[int]]) -> Activations:
    """Return the inputs of the bare base's attention projections at the end of each prompt."""
    import torch

    kept: dict[str, list[Tensor]] = {}
    handles = []

    def keep(name: str) -> Any:
        def hook(_: "nn.Module", arguments: tuple["Tensor", ...]) -> None:
            kept.setdefault(name, []).append(arguments[0][0, -_POSITIONS:].clone())

        return hook

    for name, module in model.named_modules():
        if name.endswith(_TARGETS):
            handles.append(module.register_forward_pre_hook(keep(name)))
    try:
        with torch.no_grad():
            for prompt in prompts:
                model(input_ids=torch.tensor([prompt]), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(inputs) for name, inputs in kept.items()}


def risks(
    adapter: Path, old: Path, new: Path, before: Activations, after: Activations
) -> dict[str, float]:
    """Return the three figures of one LoRA adapter under one update, by name."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    lora = load_file(adapter / "adapter_model.safetensors")
    squares = {name: [0.0, 0.0] for name in NAMES}
    with safe_open(old / "model.safetensors", "pt") as olds, \
            safe_open(new / "model.safetensors", "pt") as news:  # fmt: skip
        for name, x in before.items():
            a, b = (lora[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
            w = olds.get_tensor(f"{name}.weight").float()
            moved = news.get_tensor(f"{name}.weight").float() - w
            writes, reads = _basis(b), _basis(a.T)
            output = scale * (x @ a.T) @ b.T
            _add(squares["weights"], writes.T @ moved @ reads, writes.T @ w @ reads)
            _add(squares["inputs"], scale * ((after[name] - x) @ a.T) @ b.T, output)
            _add(squares["size"], output, x @ w.T)
    return {name: math.sqrt(part / whole) for name, (part, whole) in squares.items()}


def _basis(columns: "Tensor") -> "Tensor":
    """Return an orthonormal basis (d, r) of the span of these columns (d, r)."""
    import torch

    return torch.linalg.qr(columns).Q


def _add(sums: list[float], part: "Tensor", whole: "Tensor") -> None:
    sums[0] += float(part.square().sum())
    sums[1] += float(whole.square().sum())
