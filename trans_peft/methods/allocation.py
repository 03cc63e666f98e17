"""Limit the tensors that are allocated while PEFT builds an adapter.

PEFT would allocate a rank of 400,000,000 in adapter_config.json before shapes are compared with the
adapter's file.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from trans_peft.errors import LimitExceededError

__all__ = ["BoundedAllocation"]

_FACTORIES: frozenset[Callable[..., Any]] = frozenset({
    torch.empty, torch.empty_permuted, torch.empty_strided, torch.ones, torch.zeros, torch.full,
    torch.eye, torch.arange, torch.linspace, torch.logspace, torch.rand, torch.randn, torch.randint,
    torch.randperm, torch.tril_indices, torch.triu_indices, torch.Tensor.new_empty,
    torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_full, torch.Tensor.repeat,
})  # fmt: skip
_LARGE = 1 << 20
_NOT_ON_META = ("generator", "pin_memory", "out")


class BoundedAllocation(TorchFunctionMode):
    """Limits the new tensors of this thread inside the block to `elements` elements at any time.

    LimitExceededError before a tensor that would exceed the limit is allocated; `subject` names the
    adapter in it. Tensors from torch's factory functions count, copies of existing tensors do not.
    Large tensors count while they are alive, because some methods need large temporary tensors;
    small ones count until the end of the block.
    """

    def __init__(self, elements: int, subject: str) -> None:
        super().__init__()
        self._bound = elements
        self._small = 0
        self._large: list[tuple[StorageWeakRef, int]] = []
        self._subject = subject

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Count the elements that a factory function will allocate, before it runs."""
        kwargs = kwargs or {}
        if func not in _FACTORIES:
            return func(*args, **kwargs)
        elements = self._elements(func, args, kwargs)
        self._large = [(storage, size) for storage, size in self._large if not storage.expired()]
        used = self._small + sum(size for _, size in self._large) + elements
        if used > self._bound:
            raise LimitExceededError(
                f"{self._subject} needs larger tensors than allowed",
                expected=f"at most {self._bound:,} elements at a time",
                found=f"{used:,} or more",
                do="check its ranks and sizes against its weights and its base",
            )
        tensor = func(*args, **kwargs)
        if elements < _LARGE:
            self._small += elements
        elif isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
            self._large.append((StorageWeakRef(tensor.untyped_storage()), elements))
        return tensor

    @staticmethod
    def _elements(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        on_meta = {key: value for key, value in kwargs.items() if key not in _NOT_ON_META}
        try:
            if func is torch.Tensor.repeat:
                return int(func(args[0].to("meta"), *args[1:], **on_meta).numel())
            return int(func(*args, **on_meta | {"device": "meta"}).numel())
        except (RuntimeError, TypeError, NotImplementedError):
            return 0  # the call itself reports the same error
