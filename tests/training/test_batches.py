from collections import Counter

import pytest
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


@given(
    sources=st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 10)), min_size=2, max_size=5),
    rows=sizes,
    data=st.data(),
)
def test_every_step_has_the_mixture_of_the_weights(sources, rows, data):
    weighted = [WeightedRows(*source) for source in sources]
    total = sum(source.rows for source in weighted)
    lengths = data.draw(st.lists(st.integers(1, 500), min_size=total, max_size=total))
    order = training_order(lengths, rows, 30, 0, weighted)
    whole = sum(source.rows_per_epoch for source in weighted)
    largest_difference = max(1, len(weighted) - 1) + 1e-6
    for start in range(0, len(order), rows):
        step, first = order[start : start + rows], 0
        for source in weighted:
            found = sum(first <= row < first + source.rows for row in step)
            first += source.rows
            assert abs(found - rows * source.rows_per_epoch / whole) <= largest_difference


@pytest.mark.parametrize(
    ("sources", "lengths", "expected"),
    [
        ([(40, 1.0), (40, 1.0)], (10, 50), {2}),
        ([(40, 1.0), (40, 3.0)], (10, 50), {3}),
        ([(100, 1.0), (50, 6.0)], (50, 10), {3}),
        ([(40, 3.0), (24, 5.0)], (10, 50), {2}),
        ([(70, 1.0), (30, 1.0)], (10, 50), {1, 2}),
    ],
)
def test_sources_of_different_lengths_share_every_step(sources, lengths, expected):
    weighted = [WeightedRows(*source) for source in sources]
    (first, second) = (source.rows for source in weighted)
    tokens = [lengths[0]] * first + [lengths[1]] * second
    order = training_order(tokens, 4, 120, 42, weighted)
    found = {sum(row >= first for row in order[i : i + 4]) for i in range(0, len(order), 4)}
    assert found == expected


def test_a_pool_of_one_source_spans_epochs():
    """Stored results depend on this order, in which rows are used twice before others are used."""
    order = training_order(list(range(10, 50)), 4, 30, 42)  # 40 rows, 3 epochs in one pool
    assert Counter(order) == dict.fromkeys(range(40), 3)
    assert len(set(order[:40])) == 17
