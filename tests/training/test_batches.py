from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from trans_peft.training.batches import WeightedRows, training_order

lengths = st.lists(st.integers(1, 500), min_size=1, max_size=200)
sizes = st.integers(1, 16)


@given(lengths=lengths, rows=sizes, steps=st.integers(1, 120), seed=st.integers())
def test_the_order_is_a_function_of_the_seed(lengths, rows, steps, seed):
    order = training_order(lengths, rows, steps, seed)
    assert len(order) == rows * steps
    assert order == training_order(lengths, rows, steps, seed)


@given(lengths=lengths, rows=sizes, steps=st.integers(1, 120), seed=st.integers())
def test_every_row_is_used_equally_often(lengths, rows, steps, seed):
    counts = Counter(training_order(lengths, rows, steps, seed))
    seen = [counts[row] for row in range(len(lengths))]
    assert max(seen) - min(seen) <= 1


def test_rows_of_similar_length_share_a_step():
    lengths = [7 * i % 101 for i in range(1600)]
    order = training_order(lengths, 16, 100, seed=0)
    spread = [
        max(lengths[row] for row in order[i : i + 16])
        - min(lengths[row] for row in order[i : i + 16])
        for i in range(0, len(order), 16)
    ]
    assert sum(spread) / len(spread) < 6  # of 100; unsorted it is 88


def test_short_steps_do_not_come_first():
    lengths = list(range(1600))
    order = training_order(lengths, 16, 100, seed=0)
    firsts = [lengths[order[i]] for i in range(0, len(order), 16)]
    assert firsts != sorted(firsts)
    assert training_order(lengths, 16, 100, seed=1) != order


@given(
    sources=st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 10)), min_size=2, max_size=5),
    rows=sizes,
    steps=st.integers(1, 60),
    seed=st.integers(),
)
def test_every_source_has_its_share_and_uses_its_rows_equally_often(sources, rows, steps, seed):
    weighted = [WeightedRows(*source) for source in sources]
    lengths = [1] * sum(source.rows for source in weighted)
    order = training_order(lengths, rows, steps, seed, weighted)
    assert order == training_order(lengths, rows, steps, seed, weighted)
    counts, first = Counter(order), 0
    whole = sum(source.rows_per_epoch for source in weighted)
    for source in weighted:
        seen = [counts[row] for row in range(first, first + source.rows)]
        first += source.rows
        assert max(seen) - min(seen) <= 1
        assert abs(sum(seen) - len(order) * source.rows_per_epoch / whole) < len(weighted)


def test_sources_are_mixed_in_every_pool():
    weighted = [WeightedRows(100, 1.0), WeightedRows(50, 6.0)]
    order = training_order([1] * 150, 4, 200, 0, weighted)  # pools of 200 rows
    for first in range(0, 800, 200):
        assert sum(row >= 100 for row in order[first : first + 200]) == 150
