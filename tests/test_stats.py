"""The numbers behind a verdict: tails exact to ten digits, p-values that never overstate, tries paid."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wmengine.parts.statistics.tails import (
    binomial_interval,
    binomial_log10_point,
    binomial_log10_tail,
    paired_difference_interval,
    threshold,
)


def reference_upper(k: int, n: int, p: mpmath.mpf) -> mpmath.mpf:
    """ln P(X >= k) for k above the mean, by adding the points up in 50 digits until they no longer count."""
    point = mpmath.loggamma(n + 1) - mpmath.loggamma(k + 1) - mpmath.loggamma(n - k + 1)
    point += k * mpmath.log(p) + (n - k) * mpmath.log1p(-p) if k < n else k * mpmath.log(p)
    term, total, odds = mpmath.mpf(1), mpmath.mpf(1), p / (1 - p)
    for j in range(k, n):
        term *= odds * (n - j) / (j + 1)
        total += term
        if term < total * mpmath.mpf("1e-20"):
            break
    return point + mpmath.log(total)


def reference_tail(k: int, n: int, p: float) -> mpmath.mpf:
    """log10 P(X >= k), by whichever side of the mean can be added up without cancelling."""
    exact = mpmath.mpf(p)
    if k > n * exact:
        return reference_upper(k, n, exact) / mpmath.log(10)
    return mpmath.log1p(-mpmath.exp(reference_upper(n - k + 1, n, 1 - exact))) / mpmath.log(10)


def assert_ten_digits(k: int, n: int, p: float) -> None:
    with mpmath.workdps(50):
        expected = reference_tail(k, n, p)
        error = abs(mpmath.mpf(binomial_log10_tail(k, n, p)) - expected)
        assert error <= 1e-10 * max(1, abs(expected)), (k, n, p, float(expected), float(error))


PROBABILITIES = st.one_of(
    st.sampled_from([0.5, 0.1, 0.01, 1 / 3, 1e-3, 0.9, 0.999, 5e-324, 1e-300, 1e-17, 1 - 2.0**-53]),
    st.floats(0.0, 1.0, exclude_min=True, exclude_max=True),
)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(1, 2000), PROBABILITIES)
def test_the_tail_has_ten_digits_at_every_count(data: st.DataObject, n: int, p: float) -> None:
    assert_ten_digits(data.draw(st.integers(1, n)), n, p)


@settings(max_examples=60, deadline=None)
@given(st.integers(2000, 1_000_000), st.floats(1e-4, 0.9999), st.floats(-6.0, 40.0))
@example(1_000_000, 0.5, 0.0)
@example(1_000_000, 0.5, -0.001)
@example(1_000_000, 0.1, 0.001)
@example(1_000_000, 1e-4, 40.0)
def test_the_tail_has_ten_digits_on_both_sides_of_the_mean_of_a_million(n: int, p: float, deviations: float) -> None:
    k = round(n * p + deviations * math.sqrt(n * p * (1 - p)))
    assert_ten_digits(min(n, max(1, k)), n, p)


@pytest.mark.parametrize(
    ("k", "n", "p", "log10_p"),
    [
        (33219, 33219, 0.5, -9999.9154),  # 33219 · log10 2
        (10_000, 10_000, 0.1, -10_000.0),
        (9_999, 10_000, 0.1, -9995.0458),  # one miss: 9 · 10^4 + 1 ways of 10^-10000
        (21, 21, 0.1, -21.0),
        (1, 10**12, 5e-324, -311.3062),
    ],
)
def test_the_tail_goes_below_what_a_float_holds(k: int, n: int, p: float, log10_p: float) -> None:
    assert binomial_log10_tail(k, n, p) == pytest.approx(log10_p, abs=1e-3)
    if n < 10**12:
        assert_ten_digits(k, n, p)


def test_the_tail_equals_counting_in_fractions() -> None:
    for k in range(1, 13):
        exact = sum(Fraction(math.comb(12, j) * 9 ** (12 - j), 10**12) for j in range(k, 13))
        assert 10 ** binomial_log10_tail(k, 12, 0.1) == pytest.approx(float(exact), rel=1e-12)


def test_numbers_that_the_catalogue_of_mistakes_states() -> None:
    # 28 matches of 100 at C = 10 are needed at 1e-6, and 16 at .05; a normal fit asked for 24.3 and 14.9.
    assert threshold(100, 0.1, -6.0) == 28
    assert threshold(100, 0.1, math.log10(0.05)) == 16


@pytest.mark.parametrize(("k", "n"), [(0, 0), (0, 10), (-3, 10)])
def test_nothing_to_match_is_certain(k: int, n: int) -> None:
    assert binomial_log10_tail(k, n, 0.3) == 0.0


def test_the_ends_of_p_are_exact() -> None:
    assert binomial_log10_tail(1, 10, 0.0) == -math.inf
    assert binomial_log10_tail(10, 10, 1.0) == 0.0
    assert binomial_log10_point(0, 10, 0.0) == binomial_log10_point(10, 10, 1.0) == 0.0
    assert binomial_log10_point(1, 10, 0.0) == binomial_log10_point(9, 10, 1.0) == -math.inf


@pytest.mark.parametrize(
    ("k", "n", "p", "what"),
    [
        (11, 10, 0.5, "k"),
        (1, 0, 0.5, "k"),
        (0, -1, 0.5, "n"),
        (1, 10**12 + 1, 0.5, "n"),
        (1, 10, -0.1, "p"),
        (1, 10, 1.5, "p"),
        (1, 10, math.nan, "p"),
    ],
)
def test_an_impossible_question_is_refused(k: int, n: int, p: float, what: str) -> None:
    with pytest.raises(ValueError, match=f"^{what} must be"):
        binomial_log10_tail(k, n, p)


def test_counts_must_be_whole_numbers() -> None:
    with pytest.raises(TypeError):
        binomial_log10_tail(1.5, 10, 0.5)  # type: ignore[arg-type]
    assert binomial_log10_tail(np.int32(5), np.int64(10), np.float32(0.5)) == binomial_log10_tail(5, 10, 0.5)  # type: ignore[arg-type]


@given(st.integers(1, 200), PROBABILITIES)
def test_points_add_up_to_one_and_tails_differ_by_them(n: int, p: float) -> None:
    points = [10 ** binomial_log10_point(k, n, p) for k in range(n + 1)]
    assert math.fsum(points) == pytest.approx(1.0, abs=1e-12)
    tails = [10 ** binomial_log10_tail(k, n, p) for k in range(n + 1)]
    assert tails == pytest.approx([math.fsum(points[k:]) for k in range(n + 1)], abs=1e-12)


@pytest.mark.parametrize("k", [-1, 11])
def test_a_point_outside_the_counts_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="k must be from 0 to n = 10"):
        binomial_log10_point(k, 10, 0.5)


@given(st.integers(0, 300), PROBABILITIES, st.floats(-60.0, 0.0))
def test_the_threshold_is_the_least_count_that_convicts(n: int, p: float, log10_alpha: float) -> None:
    k = threshold(n, p, log10_alpha)
    if k is None:
        assert binomial_log10_tail(n, n, p) > log10_alpha
    else:
        assert binomial_log10_tail(k, n, p) <= log10_alpha
        assert k == 0 or binomial_log10_tail(k - 1, n, p) > log10_alpha


def test_a_bar_that_all_matches_cannot_reach_has_no_threshold() -> None:
    assert threshold(8, 0.1, -9.0) is None
    assert threshold(9, 0.1, -8.999) == 9
    assert threshold(0, 0.1, -1.0) is None
    assert threshold(10, 0.1, 0.0) == 0
    with pytest.raises(ValueError, match="NaN"):
        threshold(10, 0.1, math.nan)


# --- under the null ---

STRANGERS = [(100, 0.1, 1), (256, 0.5, 2), (20, 1 / 3, 3)]


def stranger_counts(n: int, p: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).binomial(n, p, size=20_000)


@pytest.mark.parametrize(("n", "p", "seed"), STRANGERS)
def test_a_stranger_s_p_value_is_below_a_with_chance_a_at_most(n: int, p: float, seed: int) -> None:
    p_value = np.array([10 ** binomial_log10_tail(k, n, p) for k in range(n + 1)])[stranger_counts(n, p, seed)]
    for a in np.unique(p_value):  # the empirical distribution only rises there
        simulation_error = 4.5 * math.sqrt(a * (1 - a) / p_value.size) + 4 / p_value.size
        assert (p_value <= a).mean() <= a + simulation_error


def kolmogorov_smirnov(values: np.ndarray) -> float:
    """√n times the largest distance from the uniform distribution; above 1.95 with chance 0.1 % if uniform."""
    ordered, n = np.sort(values), values.size
    above, below = np.arange(1, n + 1) / n - ordered, ordered - np.arange(n) / n
    return float(math.sqrt(n) * max(above.max(), below.max()))


@pytest.mark.parametrize(("n", "p", "seed"), STRANGERS)
def test_the_randomised_p_value_is_uniform_and_the_plain_one_is_not(n: int, p: float, seed: int) -> None:
    counts = stranger_counts(n, p, seed)
    tail = np.array([10 ** binomial_log10_tail(k, n, p) for k in range(n + 1)])
    point = np.array([10 ** binomial_log10_point(k, n, p) for k in range(n + 1)])
    uniform = np.random.default_rng(seed + 100).random(counts.size)
    randomised = tail[counts] - (1.0 - uniform) * point[counts]
    assert kolmogorov_smirnov(randomised) < 1.95
    assert kolmogorov_smirnov(tail[counts]) > 1.95  # it is discrete: the same test must not be applied to it


# --- intervals ---


def test_wilson_s_interval_agrees_with_its_published_example() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    assert binomial_interval(81, 263) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert binomial_interval(15, 148) == (pytest.approx(0.0624, abs=5e-5), pytest.approx(0.1605, abs=5e-5))
    assert binomial_interval(0, 20) == (0.0, pytest.approx(0.1611, abs=5e-5))
    assert binomial_interval(1, 29) == (pytest.approx(0.0061, abs=5e-5), pytest.approx(0.1718, abs=5e-5))
    assert binomial_interval(20, 20)[1] == 1.0


def test_an_accuracy_cost_agrees_with_a_published_interval() -> None:
    # Airway hyper-responsiveness in Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014).
    found = paired_difference_interval(1, 7, 21)
    assert [round(value, 3) for value in found] == [-0.286, -0.517, -0.026]


def test_an_accuracy_cost_has_an_interval_that_holds_its_level() -> None:
    generator = np.random.default_rng(11)
    for only_first, only_second in ((0.02, 0.01), (0.1, 0.1), (0.005, 0.0)):
        cells = generator.multinomial(400, [only_first, only_second, 1 - only_first - only_second], size=2000)
        truth = only_first - only_second
        seen, times = np.unique(cells[:, :2], axis=0, return_counts=True)
        intervals = [paired_difference_interval(first, second, 400) for first, second in seen]
        held = sum(int(time) for (_, low, high), time in zip(intervals, times, strict=True) if low <= truth <= high)
        assert 0.93 < held / 2000 < 0.995


def test_an_accuracy_cost_without_disagreement_is_not_certain() -> None:
    difference, low, high = paired_difference_interval(0, 0, 400)
    z_square = 1.959964**2
    assert difference == 0.0
    assert (low, high) == (pytest.approx(-z_square / (400 + z_square)), pytest.approx(z_square / (400 + z_square)))


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 1000))
def test_an_accuracy_cost_only_changes_sign_when_the_two_change_places(first: int, second: int, both: int) -> None:
    n = max(1, first + second + both)
    difference, low, high = paired_difference_interval(first, second, n)
    assert paired_difference_interval(second, first, n) == (-difference, pytest.approx(-high), pytest.approx(-low))
    assert -1.0 <= low <= difference <= high <= 1.0


def test_intervals_refuse_impossible_counts_and_levels() -> None:
    for successes, trials in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match="successes must be"):
            binomial_interval(successes, trials)
    for only_first, only_second, n in ((-1, 0, 5), (3, 3, 5), (0, 0, 0)):
        with pytest.raises(ValueError, match="only_first"):
            paired_difference_interval(only_first, only_second, n)
    for level in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="level"):
            binomial_interval(1, 2, level)
