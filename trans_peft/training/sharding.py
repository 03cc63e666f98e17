"""Shard the frozen weights of a base over the processes of a training, with PyTorch's FSDP2.

Each process keeps its part of every weight, and gathers the weights of a decoder layer for its
forward and its backward pass. Only frozen weights are sharded. Trained weights are ordinary tensors
that DDP keeps equal, as without sharding, so the optimizer, checkpoints and the saved adapter are
those of an unsharded training.
"""

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from peft import PeftModel
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = ["in_turns", "shard_base"]

Result = TypeVar("Result")


def in_turns(make: Callable[[], Result]) -> Result:
    """Return `make()`, which the processes of a machine call one after the other.

    Each process loads the whole base into the host's memory, which would not hold several. `make`
    must not communicate with other processes.
    """
    state = PartialState()
    for process in range(state.num_processes):
        if process == state.local_process_index:  # machines load at the same time
            result = make()
        state.wait_for_everyone()
    return result


def shard_base(model: PeftModel, mesh: DeviceMesh, device: str) -> None:
    """Shard the frozen weights of a model over `mesh`, and move its parts to `device`, in place.

    The number of gathers must be the same in all processes. Every layer takes part in every
    backward pass, because the embeddings' outputs require a gradient, even if masks, drops and
    dropout leave no trained weight below a layer.
    """
    trained = {weight for weight in model.parameters() if weight.requires_grad}
    frozen = [name for name, weight in model.named_parameters() if weight not in trained]
    for layer in reversed([*model.modules()]):  # inner layers first
        if isinstance(layer, GradientCheckpointingLayer):
            fully_shard(layer, mesh=mesh, ignored_params=trained)
    fully_shard(model, mesh=mesh, ignored_params=trained)
    for weight in trained:
        weight.data = weight.data.to(device)
    model.enable_input_require_grads()
    # DDP would broadcast the shards of the first process to the others.
    model._ddp_params_and_buffers_to_ignore = frozen
