import numpy as np
import pytest
from scipy.stats import bootstrap

from study.statistics import interval, right

GENERATOR = np.random.default_rng(3)


def answers(share, seeds=3, items=400):
    return (GENERATOR.random((seeds, items)) < share).astype(float)


def test_the_estimate_is_the_plain_difference_of_means():
    a, b = answers(0.7), answers(0.5)
    found = interval(lambda draw: draw(a) - draw(b), *a.shape)
    assert found.value == pytest.approx(100 * (a.mean() - b.mean()))
    assert found.low < found.value < found.high


def test_with_one_seed_it_is_the_percentile_bootstrap_of_the_items():
    a, b = answers(0.7, seeds=1), answers(0.6, seeds=1)
    found = interval(lambda draw: draw(a) - draw(b), *a.shape)
    scipy = bootstrap(
        (100 * (a - b)[0],), np.mean, method="percentile", n_resamples=9_999, rng=1
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((scipy.low, scipy.high), abs=0.5)


def test_seeds_that_disagree_widen_it():
    alike = np.tile(answers(0.6, seeds=1), (3, 1))
    apart = np.vstack([answers(share, seeds=1) for share in (0.4, 0.6, 0.8)])
    narrow, wide = (interval(lambda draw, x=x: draw(x), *x.shape) for x in (alike, apart))
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_what_pairs_item_by_item_is_compared_in_pairs():
    a = answers(0.5)
    b = a.copy()
    b[:, :8] = 1 - b[:, :8]  # the same answers but for eight items
    found = interval(lambda draw: draw(a) - draw(b), *a.shape)
    alone = interval(lambda draw: draw(a), *a.shape)
    assert found.high - found.low < 0.5 * (alone.high - alone.low)


def test_the_answers_of_an_arm_are_seeds_by_items():
    assert right({2: "01", 1: "11"}, (1, 2)).tolist() == [[1, 1], [0, 1]]
