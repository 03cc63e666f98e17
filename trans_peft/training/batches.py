"""Assign rows to optimizer steps before training, from the seed alone.

A sampler that draws during training cannot be resumed exactly (transformers' length-grouped sampler
uses torch's global generator). Here the whole run is one list of row numbers, so a resumed run
skips exactly the rows that were trained on. As in transformers' `LengthGroupedSampler`, rows of
similar length share a step to save padding: rows are sorted by length within random pools.
"""

import random
from collections.abc import Iterator, Sequence

__all__ = ["training_order"]

_POOL_STEPS = 50


def training_order(lengths: Sequence[int], rows_per_step: int, steps: int, seed: int) -> list[int]:
    """Return steps * rows_per_step row numbers in training order.

    `lengths` are tokens per row. Each row is used once before any row is used twice, except for
    shifts within a pool of 50 steps. Within a step rows are sorted by length, so that the rows of
    a micro-batch have similar lengths.
    """
    generator = random.Random(seed)
    endless = _passes(len(lengths), generator)
    order: list[int] = []
    while len(order) < steps * rows_per_step:
        missing = steps - len(order) // rows_per_step
        pool = [next(endless) for _ in range(rows_per_step * min(_POOL_STEPS, missing))]
        pool.sort(key=lambda row: lengths[row])
        batches = [pool[i : i + rows_per_step] for i in range(0, len(pool), rows_per_step)]
        generator.shuffle(batches)
        order += [row for batch in batches for row in batch]
    return order


def _passes(rows: int, generator: random.Random) -> Iterator[int]:
    while True:
        yield from generator.sample(range(rows), rows)
