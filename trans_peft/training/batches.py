"""Assign rows to optimizer steps before training, from the seed alone.

A sampler that draws during training cannot be resumed exactly (transformers' length-grouped sampler
uses torch's global generator). Here the whole run is one list of row numbers, so a resumed run
skips exactly the rows that were trained on. If all rows are of one source, rows of similar length
share a step to save padding, as in transformers' `LengthGroupedSampler`: rows are sorted by length
within random pools. Rows of several sources are not, because sources of different lengths would
then never share a step.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["WeightedRows", "training_order"]

_POOL_STEPS = 50


@dataclass(frozen=True)
class WeightedRows:
    """The number of rows of one data source, and how often an epoch uses each of them."""

    rows: int
    weight: float

    @property
    def rows_per_epoch(self) -> float:
        """The rows of this source that one epoch uses, repetitions included."""
        return self.rows * self.weight


def training_order(
    lengths: Sequence[int],
    rows_per_step: int,
    steps: int,
    seed: int,
    sources: Sequence[WeightedRows] = (),
) -> list[int]:
    """Return steps * rows_per_step row numbers in training order.

    `lengths` are tokens per row. Within a step rows are sorted by length, so that the rows of a
    micro-batch have similar lengths. `sources` divide the rows; without them, all rows are of one
    source.

    Rows of one source are drawn without replacement, one epoch after the other, and the drawn rows
    of 50 steps are a pool, which is sorted by length and divided into steps. A pool can have rows
    of several epochs, so that a step can have copies of a row, and a row can be used a second time
    before another one was used.

    Rows of several sources have no pools. Each step has rows of each source in proportion to the
    rows of the source times its weight: less than one row more or fewer for two sources, and less
    than n - 1 rows for n > 2 of them. A row is used again after all rows of its source were used,
    except for shifts within a step.
    """
    if len(sources) > 1:
        mixed = _interleaved(sources, seed)
        return [
            row
            for _ in range(steps)
            for row in sorted(itertools.islice(mixed, rows_per_step), key=lengths.__getitem__)
        ]
    generator = random.Random(seed)
    endless = _passes(range(len(lengths)), generator)
    order: list[int] = []
    while len(order) < steps * rows_per_step:
        missing = steps - len(order) // rows_per_step
        pool = [next(endless) for _ in range(rows_per_step * min(_POOL_STEPS, missing))]
        pool.sort(key=lambda row: lengths[row])
        batches = [pool[i : i + rows_per_step] for i in range(0, len(pool), rows_per_step)]
        generator.shuffle(batches)
        order += [row for batch in batches for row in batch]
    return order


def _passes(rows: range, generator: random.Random) -> Iterator[int]:
    while True:
        yield from generator.sample(rows, len(rows))


def _interleaved(sources: Sequence[WeightedRows], seed: int) -> Iterator[int]:
    """Yield rows of all sources, in proportion to the rows of each times its weight.

    The next row is of the source whose number of rows so far, with this row, is the smallest
    multiple of its share. Each source has an order of its own, which the others do not change.
    """
    firsts = itertools.accumulate((source.rows for source in sources), initial=0)
    streams = [
        _passes(range(first, first + source.rows), random.Random(f"{seed} {number}"))
        for number, (first, source) in enumerate(zip(firsts, sources, strict=False))
    ]
    taken = [0] * len(sources)
    while True:
        number = min(
            range(len(sources)), key=lambda i: ((taken[i] + 1) / sources[i].rows_per_epoch, i)
        )
        taken[number] += 1
        yield next(streams[number])
