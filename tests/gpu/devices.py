"""The devices of a test, what a test needs beside a GPU, and a GPU with little memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def on_gpu(package: str = ""):
    """Return the marks of a case that needs a GPU, and a package that `make gpu` installs."""
    marks = [pytest.mark.gpu]
    if package:
        missing = find_spec(package) is None
        marks.append(pytest.mark.skipif(missing, reason=f"needs the package {package}"))
    return marks


@contextmanager
def more_gpu_memory(size_bytes: int) -> Iterator[None]:
    """Let PyTorch reserve so many bytes more than the tensors that exist."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties().total_memory
    allowed = torch.cuda.memory_reserved() + size_bytes
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def fill_reserved_memory() -> list[torch.Tensor]:
    """Return tensors that fill what PyTorch has reserved and may not extend."""
    tensors = []
    for size_bytes in (2**21, 2**18, 2**14):
        try:
            while True:
                tensors.append(torch.empty(size_bytes, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            continue
    return tensors
