"""Place a base on the GPUs of this machine, and what does not fit there in the host's memory.

Everything outside the decoder layers is on the first GPU. Each decoder layer computes on one GPU:
its inputs are moved there, and its outputs back to the first GPU. The weights of a streamed layer
stay in the host's memory, and are copied to the first GPU for each pass of the layer.

Between two passes every weight is an ordinary tensor with its values. accelerate's offloading
leaves meta tensors there, on which most PEFT methods cannot be attached.
"""

import gc
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trans_peft.errors import OutOfMemoryError

__all__ = ["DeviceMemory", "gpus", "layer_devices", "place"]

_log = logging.getLogger(__name__)

_SHARE = 0.9
"""Share of a GPU's free memory that weights may fill. Adapters, the key-value cache and logits need
the rest; a batch that does not fit is halved."""

_GIB = 1 << 30


@dataclass(frozen=True)
class DeviceMemory:
    """A device, and how many bytes of weights it can hold."""

    device: str
    size_bytes: int


def gpus() -> list[DeviceMemory]:
    """Return the visible GPUs in order, with their memory for weights. Empty without CUDA."""
    if not torch.cuda.is_available():
        return []
    gc.collect()  # models refer to themselves
    torch.cuda.empty_cache()
    return [
        DeviceMemory(f"cuda:{i}", int(_SHARE * torch.cuda.mem_get_info(i)[0]))
        for i in range(torch.cuda.device_count())
    ]


def place(model: nn.Module, devices: Sequence[DeviceMemory]) -> None:
    """Move a base in host memory to `devices`, in place. Its logits do not depend on the devices.

    A base that fits the first device is moved there as a whole. Otherwise all devices get the same
    share of their memory filled. The layers for which no memory is left are streamed.

    Raises OutOfMemoryError if the first device cannot hold what is outside the layers, and one
    layer if any has to be streamed.
    """
    if not devices:
        return
    total, first = _size_bytes(model), devices[0]
    if total <= first.size_bytes:
        _move(_tensors(model), first.device)
        return
    layers = _layers(model)
    sizes = [_size_bytes(layer) for layer in layers]
    chosen = layer_devices(sizes, total - sum(sizes), [device.size_bytes for device in devices])
    inside = {id(tensor) for layer in layers for tensor in _tensors(layer)}
    _move([tensor for tensor in _tensors(model) if id(tensor) not in inside], first.device)
    for layer, number in zip(layers, chosen, strict=True):
        device = first.device if number is None else devices[number].device
        if number is not None:
            _move(_tensors(layer), device)
        elsewhere = _Elsewhere(device, first.device, is_streamed=number is None)
        layer.register_forward_pre_hook(elsewhere.before, with_kwargs=True)
        layer.register_forward_hook(elsewhere.after, always_call=True)
    _log_places(devices, sizes, chosen)


def layer_devices(layers: Sequence[int], outside: int, devices: Sequence[int]) -> list[int | None]:
    """Return the number of each layer's device; None for a layer that is streamed.

    Args:
        layers: sizes of the layers in order, in bytes.
        outside: size of what is outside the layers, which is on the first device.
        devices: memory of the devices in bytes.

    Example::

        >>> layer_devices([4, 4, 4, 4], 2, [10, 10])
        [0, 0, 1, 1]
        >>> layer_devices([4, 4, 4, 4], 2, [10])
        [0, None, None, None]

    Raises OutOfMemoryError if the first device cannot hold `outside`, and one layer if any has to
    be streamed.
    """
    least = 100 * (outside + sum(layers)) // max(1, sum(devices))
    for percent in range(least, 101):
        limits = [size * percent // 100 for size in devices]
        limits[0] -= outside
        if limits[0] >= 0 and None not in (found := _filled(layers, limits)):
            return found
    limits = [devices[0] - outside - max(layers, default=0), *devices[1:]]
    if limits[0] < 0:
        raise OutOfMemoryError(
            "the base does not fit the GPU, even with one decoder layer at a time",
            expected=f"{(devices[0] - limits[0]) / _GIB:.2f} GiB for weights",
            found=f"{devices[0] / _GIB:.2f} GiB, {_SHARE:.0%} of what is free",
            do="use a GPU with more memory, end other processes on it, or load the base in a "
            "smaller dtype",
        )
    return _filled(layers, limits)


def _filled(layers: Sequence[int], limits: Sequence[int]) -> list[int | None]:
    """Fill one device after the other with layers, in order."""
    found: list[int | None] = []
    number, free = 0, limits[0]
    for size in layers:
        while size > free and number < len(limits):
            number += 1
            free = limits[number] if number < len(limits) else 0
        free -= size
        found.append(number if number < len(limits) else None)
    return found


@dataclass
class _Elsewhere:
    """Hooks of a layer whose device is another than that of its inputs or of its weights."""

    device: str
    first: str
    is_streamed: bool
    _at_home: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def before(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Move the inputs to the device, and copies of streamed weights."""
        if self.is_streamed:
            self._at_home = [(tensor, tensor.data) for tensor in _tensors(layer)]
            for tensor, data in self._at_home:
                tensor.data = data.to(self.device, copy=True)
        return _moved(args, self.device), _moved(kwargs, self.device)

    def after(self, _layer: nn.Module, _args: tuple[Any, ...], outputs: Any) -> Any:
        """Drop the copies, also after an error, and move the outputs to the first device."""
        for tensor, data in self._at_home:
            tensor.data = data
        self._at_home = []
        return _moved(outputs, self.first)


def _move(tensors: Sequence[Tensor], device: str) -> None:
    for tensor in tensors:
        tensor.data = tensor.data.to(device)


def _moved(value: Any, device: str) -> Any:
    """Move the tensors of nested containers. A key-value cache stays: each layer has its own."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        moved = (_moved(item, device) for item in value)
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers that share no weight with another part of the model."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    nested = {id(part) for layer in found for part in layer.modules() if part is not layer}
    uses = Counter(id(tensor) for _, tensor in model.named_parameters(remove_duplicate=False))
    return [
        layer
        for layer in found
        if id(layer) not in nested and all(uses[id(weight)] == 1 for weight in layer.parameters())
    ]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _size_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in _tensors(module))


def _log_places(
    devices: Sequence[DeviceMemory], sizes: Sequence[int], chosen: Sequence[int | None]
) -> None:
    counts = Counter(chosen)
    _log.info(
        "the base does not fit %s alone; decoder layers: %s",
        devices[0].device,
        ", ".join(f"{counts[i]} on {device.device}" for i, device in enumerate(devices)),
    )
    if counts[None]:
        streamed = sum(size for size, number in zip(sizes, chosen, strict=True) if number is None)
        _log.warning(
            "%d of %d decoder layers do not fit the GPUs; %.2f GiB are copied from the host's "
            "memory for each pass, which makes it slow",
            counts[None],
            len(sizes),
            streamed / _GIB,
        )
