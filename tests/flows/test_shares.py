"""Families share the GPU slots: a large one does not starve a small one, and no slot is idle.

The queue is Prefect's: first due, first started, and as many runs as there are slots. Each family
has a reconcile that reads its fleet and starts its next shards by the rules of `tasks.shards`.
"""

import heapq
from collections import deque
from random import Random

import pytest

from tasks.shards import enough_ended, max_active

READ_S, SHARD_S = 60.0, (100.0, 300.0)


class Family:
    def __init__(self, name, shards, arrives_s=0.0):
        self.name, self.left, self.arrives_s = name, shards, arrives_s
        self.active = self.ended = 0

    def next_shards(self, slots):
        """Return how many shards a reconcile starts now."""
        count = min(self.left, max_active(slots) - self.active)
        self.left -= count
        self.active += count
        self.ended = 0
        return count


def starts_of(families, slots, seed=0):
    """Return (time, end, family) of each shard, in the order of their starts."""
    random, queue, starts, free = Random(seed), deque(), [], slots
    events = [(one.arrives_s, number, "read", one) for number, one in enumerate(families)]
    heapq.heapify(events)
    ties = len(events)
    while events:
        now, _, what, one = heapq.heappop(events)
        if what == "read":
            queue.extend([one] * one.next_shards(slots))
        else:
            free += 1
            one.active -= 1
            one.ended += 1
            if one.left and one.ended == enough_ended(slots):
                ties += 1
                heapq.heappush(events, (now + READ_S, ties, "read", one))
        while free and queue:
            started = queue.popleft()
            free -= 1
            ties += 1
            end_s = now + random.uniform(*SHARD_S)
            heapq.heappush(events, (end_s, ties, "end", started))
            starts.append((now, end_s, started.name))
    return starts


SLOTS = pytest.mark.parametrize("slots", [1, 2, 8, 64])


@SLOTS
def test_all_shards_run_and_no_slot_is_idle_while_a_family_has_more(slots):
    total = 20 * slots + 50
    starts = starts_of([Family("large", total)], slots)
    assert len(starts) == total
    last_s = starts[-1][0]
    busy_s = sum(min(end_s, last_s) - start_s for start_s, end_s, _ in starts)
    assert busy_s == pytest.approx(slots * last_s)


@SLOTS
def test_a_small_family_waits_for_two_rounds_of_a_large_one_at_most(slots):
    arrives_s = 5000.0
    starts = starts_of([Family("large", 300 + 40 * slots), Family("small", 1, arrives_s)], slots)
    after = [name for at, _, name in starts if at >= arrives_s]
    assert "large" in after[after.index("small") :]  # the large one has more to do
    assert after.index("small") <= max(2 * slots, 8)


@SLOTS
def test_two_large_families_take_turns(slots):
    each = 100 + 20 * slots
    starts = starts_of([Family("a", each), Family("b", each, arrives_s=1000.0)], slots)
    both = [name for at, _, name in starts if at >= 1000.0][: 2 * each // 3]
    assert abs(both.count("a") - both.count("b")) <= max_active(slots)
