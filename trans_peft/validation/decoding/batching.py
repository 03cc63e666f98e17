"""Run items in batches, and halve the batch size when memory runs out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from trans_peft.errors import EvaluationError

__all__ = ["DEFAULT_BATCH_SIZE", "Progress", "evaluating", "in_batches", "is_out_of_memory"]

Progress = Callable[[int, int], None]
"""Called with the number of items answered so far and the total."""

DEFAULT_BATCH_SIZE = 32

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def in_batches(
    items: Sequence[Item],
    answer: Callable[[Sequence[Item]], Sequence[Answer]],
    *,
    size: int | None,
    describe: Callable[[Item], str],
    keep_together: Callable[[Sequence[Item]], int] = len,
    on_progress: Progress | None = None,
) -> list[Answer]:
    """Return `answer` of all items, in batches of at most `size` (None: 32), in the given order.

    `keep_together` returns how many items at the start of a batch to answer together; the others
    start the next batch. A batch that does not fit into memory is halved and tried again, and the
    following batches are not larger than it. Pass the largest items first, so that this happens
    early. Raises EvaluationError, with the text of `describe`, if a single item does not fit.
    """
    size = size or DEFAULT_BATCH_SIZE
    answers: list[Answer] = []
    while len(answers) < len(items):
        batch = items[len(answers) : len(answers) + size]
        batch = batch[: keep_together(batch)]
        found = _tried(answer, batch)
        if found is None:
            if len(batch) == 1:
                raise EvaluationError(
                    "out of memory with a single item",
                    found=describe(batch[0]),
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
    """Whether an error means that a device or the host ran out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The message of torch's CPU allocator (c10/core/impl/alloc_cpu.cpp).
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules into evaluation mode for the block, and restore their modes after it."""
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
    """Answer one batch. None if memory ran out; the batch's tensors are freed by then."""
    try:
        return answer(batch)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return None
        raise
