"""Estimate the peak memory of a training step from shapes, before any weight is loaded.

The model is built without weights, and one forward and backward pass runs on PyTorch's fake
tensors, which have shapes and no content. The largest sum of the bytes that are alive at one time
is the peak. It holds for every architecture, every method of PEFT and every attention
implementation, because the code of the training runs.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.errors import InvalidSpecError, TransPeftError
from trans_peft.methods.specs import attach
from trans_peft.training.events import MemoryEstimated

__all__ = ["StepShape", "check_memory", "estimate_memory", "trainable_parameters"]

_GIB = 1 << 30
_NF4_BYTES = (4 + 0.127) / 8
"""Bytes of a weight in NF4 with double quantization (Dettmers et al. 2023)."""


@dataclass(frozen=True)
class StepShape:
    """The largest micro-batch of a process.

    Attributes:
        rows: sequences.
        tokens: tokens of each sequence, padding included.
        answer_tokens: tokens of each sequence for which logits are computed, at most.
    """

    rows: int
    tokens: int
    answer_tokens: int


def check_memory(recipe: TrainingRecipe, base: Path, shape: StepShape) -> MemoryEstimated:
    """Return the estimate for a recipe with `compute.memory_gib`.

    Raises InvalidSpecError if the peak is larger, with the peaks of changed recipes, and if the
    architecture or the adapter cannot be run on fake tensors.
    """
    limit = recipe.compute.memory_gib
    assert limit is not None
    found = estimate_memory(recipe, base, shape)
    if found.peak_bytes <= limit * _GIB:
        return found
    changes = []
    if not recipe.compute.gradient_checkpointing:
        compute = replace(recipe.compute, gradient_checkpointing=True)
        changed = estimate_memory(replace(recipe, compute=compute), base, shape)
        changes.append(f"compute.gradient_checkpointing: {changed.peak}")
    if shape.rows > 1:
        half = replace(shape, rows=shape.rows // 2)
        changes.append(
            f"half of optimizer.batch_size, with twice the gradient_accumulation: "
            f"{estimate_memory(recipe, base, half).peak}"
        )
    raise InvalidSpecError(
        "the training needs more memory than the recipe allows",
        expected=f"at most {limit:g} GiB for each process (compute.memory_gib)",
        found=found,
        do="; ".join(changes or ["lower optimizer.max_length, or raise compute.memory_gib"]),
    )


def estimate_memory(recipe: TrainingRecipe, base: Path, shape: StepShape) -> MemoryEstimated:
    """Return the memory of one training step of one process.

    Not included: the masks of granularity "element", what PyTorch's allocator reserves beyond
    tensors, and the context of a GPU. Raises InvalidSpecError if the step cannot be run on fake
    tensors.
    """
    try:
        return _estimate(recipe, base, shape)
    except TransPeftError:
        raise
    except Exception as error:  # any line of an architecture or a method can fail
        raise InvalidSpecError(
            "the memory of the training cannot be estimated",
            found=f"{type(error).__name__}: {error}",
            do="remove compute.memory_gib from the recipe",
        ) from error


def trainable_parameters(recipe: TrainingRecipe, base: Path) -> int:
    """Return the number of parameters that a recipe trains. `base` needs no more than a config."""
    return _trained(_without_weights(recipe, base))


def _trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _estimate(recipe: TrainingRecipe, base: Path, shape: StepShape) -> MemoryEstimated:
    model = _without_weights(recipe, base)
    trained = _trained(model)
    with FakeTensorMode():
        _make_fake(model)
        ids = torch.zeros(shape.rows, shape.tokens, dtype=torch.long)
        held = [*model.parameters(), *model.buffers()]
        with _LiveBytes(held) as live:
            held_bytes = live.now
            _forward_and_backward(model, ids, shape.answer_tokens)
    trained_bytes = 4 * trained  # adapters are trained in float32
    bytes_of_state = 2 if "8bit" in recipe.optimizer.name else 8  # both moments of a weight
    copies = 0
    if recipe.processes > 1:
        copies += 1  # the buckets of DistributedDataParallel
    if recipe.optimizer.gradient_accumulation > 1:
        copies += 1  # gradients of earlier micro-steps during a forward pass
    base_bytes = held_bytes - trained_bytes
    if recipe.dtype == "nf4":
        base_bytes -= _saved_by_nf4(model)
    if recipe.compute.sharding:
        base_bytes = base_bytes // recipe.processes + _gathered(model)
    masks = shape.rows * shape.tokens**2  # one byte for each pair of tokens
    return MemoryEstimated(
        base_bytes=base_bytes,
        adapter_bytes=trained_bytes,
        optimizer_bytes=bytes_of_state * trained + copies * trained_bytes,
        activation_bytes=live.peak - held_bytes + masks,
    )


def _without_weights(recipe: TrainingRecipe, base: Path) -> PeftModel:
    """Return the model with its adapter on the device `meta`, in training mode."""
    options: dict[str, Any] = {
        "dtype": torch.float32 if recipe.dtype == "float32" else torch.bfloat16
    }
    if recipe.compute.attention in ("sdpa", "eager"):  # the others need no more than sdpa
        options["attn_implementation"] = recipe.compute.attention
    config = AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model = attach(AutoModelForCausalLM.from_config(config, **options), recipe.spec)
    if recipe.compute.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _make_fake(model: nn.Module) -> None:
    """Replace all tensors of a model on `meta` with fake ones on the CPU, in place.

    `Module.to` cannot do this. On the CPU and on a GPU, attention needs memory in proportion to the
    tokens; on `meta` PyTorch chooses the implementation that needs their square.
    """
    made: dict[int, torch.Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = (
                        nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                    )
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]


def _forward_and_backward(model: PeftModel, ids: torch.Tensor, answer_tokens: int) -> None:
    def narrow(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (arguments[0][:, -answer_tokens:], *arguments[1:])  # as AnswerTrainer does

    model.get_output_embeddings().register_forward_pre_hook(narrow)
    logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
    targets = ids[:, -answer_tokens:].flatten()
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()


def _saved_by_nf4(model: PeftModel) -> int:
    """Return the bytes by which NF4 is smaller than bfloat16, less one layer in both."""
    head = model.get_output_embeddings()
    weights = {
        id(module): module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad
    }
    largest = max(weights.values(), default=0)
    return int((2 - _NF4_BYTES) * sum(weights.values()) - 2 * largest)


def _gathered(model: PeftModel) -> int:
    """Return the bytes that FSDP2 gathers at most: two layers, and all that is outside of layers.

    The second layer is gathered while the first one computes.
    """
    layers = [
        sum(weight.nbytes for weight in layer.parameters() if not weight.requires_grad)
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer)
    ]
    frozen = sum(weight.nbytes for weight in model.parameters() if not weight.requires_grad)
    return max(frozen - sum(layers), 0) + 2 * max(layers, default=0)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive.

    Attributes:
        now: bytes at present.
        peak: the most at one time.
    """

    def __init__(self, held: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in held:
            self._add(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        size_bytes = storage.nbytes()
        self._seen[storage] = size_bytes
        self.now += size_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size_bytes)

    def _free(self, size_bytes: int) -> None:
        self.now -= size_bytes
