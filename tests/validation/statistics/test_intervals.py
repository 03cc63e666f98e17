from itertools import product
from math import isclose

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import gammaln, xlogy
from scipy.stats import binom, norm

from trans_peft.errors import InvalidSpecError
from trans_peft.validation.statistics.intervals import (
    items_to_decide,
    lower_bound,
    power_of_non_inferiority,
    score_statistic,
    upper_bound,
)

ALPHAS = st.sampled_from([0.01, 0.025, 0.05, 0.2])


@st.composite
def counts(draw, largest=400):
    n = draw(st.integers(1, largest))
    b = draw(st.integers(0, n))
    return n, b, draw(st.integers(0, n - b))


def trinomial(n, p_b, p_c):
    """Every (b, c) and its probability."""
    cells = [(b, c) for b in range(n + 1) for c in range(n + 1 - b)]
    b, c = np.array(cells).T
    rest = n - b - c
    log_p = gammaln(n + 1) - gammaln(b + 1) - gammaln(c + 1) - gammaln(rest + 1)
    log_p += xlogy(b, p_b) + xlogy(c, p_c) + xlogy(rest, 1 - p_b - p_c)
    return b, c, np.exp(log_p)


# Comparison with the likelihood and with published values.


@given(counts(200), st.integers(-900, 900).map(lambda mille: mille / 1000))
def test_the_statistic_is_pearsons_chi_square_at_the_numerically_constrained_likelihood(
    pairs, difference
):
    n, b, c = pairs

    def minus_log_likelihood(q):
        return -(xlogy(b, q) + xlogy(c, q + difference) + xlogy(n - b - c, 1 - 2 * q - difference))

    least, most = max(0.0, -difference), (1 - difference) / 2
    q = minimize_scalar(
        minus_log_likelihood, bounds=(least, most), method="bounded", options={"xatol": 1e-13}
    ).x
    expected = n * np.array([q, q + difference, 1 - 2 * q - difference])
    found = np.array([b, c, n - b - c])
    real = expected > 1e-6 * n  # a cell with a fitted probability of 0 has no observations
    chi_square = np.sum((found[real] - expected[real]) ** 2 / expected[real])
    t = float(score_statistic(n, b, c, difference))
    assert t**2 == pytest.approx(chi_square, rel=1e-3, abs=1e-3)
    assert t == 0 or np.sign(t) == np.sign((c - b) / n - difference)


@pytest.mark.parametrize(
    ("n", "b", "c", "alpha", "lower", "upper", "digits"),
    [
        # Tango 1998, crossover trial of soft contact lenses, 90 %; also in the tests of the R
        # package ratesci (P. Laud)
        (44, 1, 0, 0.05, -0.096, 0.037, 3),
        # 95 %, tests of ratesci
        (32, 3, 9, 0.025, -0.027, 0.390, 3),
        # Cavo et al. 2012 in Fagerland, Lydersen, Laake, "Statistical Analysis of Contingency
        # Tables", chapter 8; tests of the R package contingencytables
        (161, 16, 6, 0.025, -0.1240, -0.0054, 4),
    ],
)
def test_bounds_match_published_values(n, b, c, alpha, lower, upper, digits):
    assert round(lower_bound(n, b, c, alpha), digits) == lower
    assert round(upper_bound(n, b, c, alpha), digits) == upper


@given(counts(), ALPHAS)
def test_the_statistic_at_a_bound_is_the_quantile(pairs, alpha):
    n, b, _ = pairs
    lower = lower_bound(*pairs, alpha)
    if b < n:
        assert float(score_statistic(*pairs, lower)) == pytest.approx(norm.isf(alpha), abs=1e-5)


# Properties.


@given(counts(), ALPHAS)
def test_swapping_the_pair_mirrors_the_bounds(pairs, alpha):
    n, b, c = pairs
    assert isclose(lower_bound(n, b, c, alpha), -upper_bound(n, c, b, alpha), abs_tol=1e-9)
    assert isclose(upper_bound(n, b, c, alpha), -lower_bound(n, c, b, alpha), abs_tol=1e-9)


@given(counts(), ALPHAS)
def test_bounds_enclose_the_difference_inside_minus_one_and_one(pairs, alpha):
    n, b, c = pairs
    lower, upper = lower_bound(*pairs, alpha), upper_bound(*pairs, alpha)
    assert -1 <= lower <= (c - b) / n + 1e-9
    assert (c - b) / n - 1e-9 <= upper <= 1


@given(counts(), ALPHAS)
def test_a_stricter_level_never_narrows(pairs, alpha):
    assert lower_bound(*pairs, alpha / 2) <= lower_bound(*pairs, alpha) + 1e-9


@pytest.mark.parametrize("n", [1, 2, 7, 25])
@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.3])
def test_one_more_right_answer_after_never_lowers_a_bound(n, alpha):
    cells = [(b, c) for b, c in product(range(n + 1), repeat=2) if b + c <= n]
    bounds = {(b, c): (lower_bound(n, b, c, alpha), upper_bound(n, b, c, alpha)) for b, c in cells}
    for b, c in cells:
        better = [(b - 1, c), (b, c + 1)]  # one loss fewer, or one gain more
        for after in (bounds[cell] for cell in better if cell in bounds):
            assert after[0] >= bounds[b, c][0] - 1e-9
            assert after[1] >= bounds[b, c][1] - 1e-9


@pytest.mark.parametrize("n", [1, 10, 52, 1000])
def test_without_discordant_pairs_the_bound_is_z2_over_n_plus_z2(n):
    z2 = norm.isf(0.05) ** 2
    assert upper_bound(n, 0, 0, 0.05) == pytest.approx(z2 / (n + z2))


def test_all_gained_or_all_lost_touches_the_end():
    assert lower_bound(1, 1, 0, 0.05) == -1
    assert upper_bound(1, 0, 1, 0.05) == 1
    assert upper_bound(30, 30, 0, 0.05) == pytest.approx(-(30 - 2.7055) / (30 + 2.7055), abs=1e-4)


@pytest.mark.parametrize(
    ("n", "b", "c", "alpha"), [(0, 0, 0, 0.05), (3, 2, 2, 0.05), (3, -1, 0, 0.05), (3, 0, 0, 0.5)]
)
def test_inconsistent_counts_are_rejected(n, b, c, alpha):
    with pytest.raises(InvalidSpecError):
        lower_bound(n, b, c, alpha)


# Level and power, summed over the exact distribution.


@pytest.mark.parametrize("n", [50, 100, 200])
@pytest.mark.parametrize("discordant", [0.06, 0.1, 0.2, 0.4])
@pytest.mark.parametrize("alpha", [0.01, 0.05])
def test_a_true_loss_equal_to_the_margin_passes_no_more_often_than_alpha(n, discordant, alpha):
    margin = 0.05
    b, c, p = trinomial(n, (discordant + margin) / 2, (discordant - margin) / 2)
    false_passes = p[score_statistic(n, b, c, -margin) > norm.isf(alpha)].sum()
    assert false_passes <= 1.06 * alpha
    if n * discordant >= 20:
        assert false_passes >= 0.7 * alpha


def test_mcnemars_test_does_not_show_non_inferiority():
    """200 items, a true loss of 5 points: McNemar's test finds no difference in 63 % of cases."""
    not_significant = {}
    for discordant in (0.15, 0.2):
        b, c, p = trinomial(200, (discordant + 0.05) / 2, (discordant - 0.05) / 2)
        exact_p = 2 * binom.cdf(np.minimum(b, c), b + c, 0.5)
        not_significant[discordant] = p[exact_p > 0.05].sum()
    assert round(not_significant[0.15], 2) == 0.63
    assert round(not_significant[0.2], 2) == 0.70


@pytest.mark.parametrize(
    ("n", "share", "margin"), [(60, 0.1, 0.1), (120, 0.2, 0.05), (52, 0, 0.05)]
)
def test_power_is_the_exact_probability_of_passing_if_nothing_was_lost(n, share, margin):
    b, c, p = trinomial(n, share / 2, share / 2)
    expected = p[score_statistic(n, b, c, -margin) > norm.isf(0.05)].sum()
    assert power_of_non_inferiority(n, share, margin, 0.05) == pytest.approx(expected, abs=1e-9)


def test_500_items_have_80_percent_power_at_20_percent_discordant():
    assert power_of_non_inferiority(500, 0.2, 0.05, 0.05) == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize(("n", "passes"), [(51, 0.0), (52, 1.0)])
def test_below_52_items_no_result_shows_a_loss_below_five_points(n, passes):
    assert power_of_non_inferiority(n, 0.0, 0.05, 0.05) == passes


@given(counts(), st.floats(0.01, 0.5), ALPHAS)
def test_power_is_a_probability(pairs, margin, alpha):
    n, discordant, _ = pairs
    assert -1e-9 <= power_of_non_inferiority(n, discordant / n, margin, alpha) <= 1 + 1e-9


@pytest.mark.parametrize(("n", "b", "c"), [(100, 10, 10), (60, 3, 3), (40, 8, 8)])
def test_items_to_decide_reaches_the_requested_power(n, b, c):
    needed = items_to_decide(n, b, c, -0.05, 0.05, power=0.8)
    assert power_of_non_inferiority(needed, (b + c) / n, 0.05, 0.05) == pytest.approx(0.8, abs=0.04)


@given(counts(), st.sampled_from([-0.05, 0.0, 0.1]))
def test_items_to_decide_is_finite_and_never_below_n(pairs, difference):
    assert items_to_decide(*pairs, difference, 0.05) >= pairs[0]


def test_an_observed_loss_equal_to_the_margin_needs_very_many_items():
    assert items_to_decide(100, 15, 10, -0.05, 0.05) > 10_000


def test_power_rejects_an_invalid_margin():
    with pytest.raises(InvalidSpecError, match="margin"):
        power_of_non_inferiority(10, 0.2, 5.0, 0.05)
