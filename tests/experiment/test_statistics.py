import math

import numpy as np
import pytest
from scipy.stats import bootstrap

from trans_peft.experiment.statistics import Interval, paired_p, resampled, right

GENERATOR = np.random.default_rng(3)


def answers(share, runs=3, items=400):
    return (GENERATOR.random((runs, items)) < share).astype(float)


def difference(a, b):
    return Interval.of(resampled([a]) - resampled([b]))


def test_the_estimate_is_the_plain_difference_of_means():
    a, b = answers(0.7), answers(0.5)
    found = difference(a, b)
    assert found.value == pytest.approx(100 * (a.mean() - b.mean()))
    assert found.low < found.value < found.high


def test_with_one_run_it_is_the_percentile_bootstrap_of_the_items():
    a, b = answers(0.7, runs=1), answers(0.6, runs=1)
    found = difference(a, b)
    scipy = bootstrap(
        (100 * (a - b)[0],), np.mean, method="percentile", n_resamples=9_999, rng=1
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((scipy.low, scipy.high), abs=0.5)


def test_an_average_over_suites_has_the_variance_of_separate_items():
    suites = [answers(0.5, runs=1, items=n) for n in (100, 400)]
    draws = resampled(suites)
    expected = math.sqrt(sum(100**2 * s.var() / s.size for s in suites)) / 2
    assert draws[0] == pytest.approx(np.mean([100 * s.mean() for s in suites]))
    assert draws[1:].std() == pytest.approx(expected, rel=0.05)


def test_a_draw_takes_the_same_runs_in_every_suite():
    suite = np.vstack([np.zeros(50), np.ones(50)])  # the items add no variance
    draws = resampled([suite, suite[:, :20]])
    assert set(draws[1:]) == {0.0, 50.0, 100.0}


def test_runs_that_disagree_widen_it():
    alike = np.tile(answers(0.6, runs=1), (3, 1))
    apart = np.vstack([answers(share, runs=1) for share in (0.4, 0.6, 0.8)])
    narrow, wide = (Interval.of(resampled([x])) for x in (alike, apart))
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_what_pairs_item_by_item_is_compared_in_pairs():
    a = answers(0.5)
    b = a.copy()
    b[:, :8] = 1 - b[:, :8]  # the same answers but for eight items
    found = difference(a, b)
    alone = Interval.of(resampled([a]))
    assert found.high - found.low < 0.5 * (alone.high - alone.low)


def test_the_answers_of_an_arm_are_runs_by_items():
    assert right(["11", "01"]).tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize("runs", [3, 4, 5])
def test_the_p_value_is_that_of_students_distribution(runs):
    """Compared with the closed forms of the distribution for 2, 3 and 4 degrees of freedom."""
    ours, theirs = GENERATOR.normal(1, 1, runs), GENERATOR.normal(0, 1, runs)
    d = ours - theirs
    t = abs(d.mean()) / (d.std(ddof=1) / math.sqrt(runs))
    df = runs - 1
    inside = {
        2: t / math.sqrt(2 + t**2),
        3: 2 / math.pi * (t / math.sqrt(3) / (1 + t**2 / 3) + math.atan(t / math.sqrt(3))),
        4: t / math.sqrt(4 + t**2) * (1 + 2 / (4 + t**2)),
    }[df]
    assert paired_p(ours, theirs) == pytest.approx(1 - inside)


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], [0.0]), ([2.0, 3.0], [1.0, 2.0])])
def test_there_is_no_p_value_for_one_run_or_equal_differences(ours, theirs):
    assert paired_p(ours, theirs) is None


def test_p_values_are_uniform_without_a_difference():
    found = [paired_p(*GENERATOR.normal(size=(2, 3))) for _ in range(400)]
    assert np.mean([p < 0.2 for p in found]) == pytest.approx(0.2, abs=0.06)
