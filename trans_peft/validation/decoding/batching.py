"""Batches that shrink where memory does not suffice, and go on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from trans_peft.errors import EvaluationError

__all__ = ["DEFAULT_BATCH_SIZE", "Progress", "evaluating", "in_batches", "is_out_of_memory"]

Progress = Callable[[int, int], None]
"""Called with the number of items answered so far, and of all."""

DEFAULT_BATCH_SIZE = 32

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def in_batches(
    items: Sequence[Item],
    answer: Callable[[Sequence[Item]], Sequence[Answer]],
    *,
    size: int | None,
    told_as: Callable[[Item], str],
    together: Callable[[Sequence[Item]], int] = len,
    on_progress: Progress | None = None,
) -> list[Answer]:
    """Return `answer` of all items, taken in their order in batches of `size` (None: 32).

    `together` says how many of a batch, from its first, are better answered without the others,
    which begin the next one. A batch that does not fit into memory is halved and tried again, and
    all that follow are of the size that did. Give the largest items first: what does not fit shows
    at once. Raises EvaluationError where one item alone does not fit; `told_as` says which it was.
    """
    size = size or DEFAULT_BATCH_SIZE
    answers: list[Answer] = []
    while len(answers) < len(items):
        batch = items[len(answers) : len(answers) + size]
        batch = batch[: together(batch)]
        found = _tried(answer, batch)
        if found is None:
            if len(batch) == 1:
                raise EvaluationError(
                    "out of memory with a single item",
                    found=told_as(batch[0]),
                    do="shorten the item, load the base in a smaller dtype, or use a larger device",
                )
            size = len(batch) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        answers += found
        if on_progress is not None:
            on_progress(len(answers), len(items))
    return answers


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # How torch's allocator says it on a CPU (c10/core/impl/alloc_cpu.cpp).
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode inside the block, and back as it was after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _tried(
    answer: Callable[[Sequence[Item]], Sequence[Answer]], batch: Sequence[Item]
) -> Sequence[Answer] | None:
    """Answer one batch; None where memory did not suffice (all of its tensors are gone by then)."""
    try:
        return answer(batch)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return None
        raise
