"""Which rows make up which optimiser step: decided before training, from the seed alone.

A sampler that draws while training runs cannot be resumed exactly (transformers' length-grouped one
takes its draws from torch's global state). Here the whole run is one list of row numbers, so that a
resumed run skips exactly what the first one did. Rows of similar length share a step, to save
padding, but which rows meet and in which order they come stays random (as in transformers'
`LengthGroupedSampler`: sorting happens within random pools of many steps).
"""

import random
from collections.abc import Iterator, Sequence

__all__ = ["training_order"]

_POOL_STEPS = 50


def training_order(lengths: Sequence[int], rows_per_step: int, steps: int, seed: int) -> list[int]:
    """Return steps * rows_per_step row numbers, in the order in which they are trained on.

    `lengths` are tokens per row. Every row comes once before any comes twice, up to a pool of
    50 steps. Within a step rows are sorted by length, so that its micro-batches are even.
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
