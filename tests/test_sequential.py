"""The sequential test against its definition (numerical integration), and its error, exactly, by dynamic programming.

Under the null each answer matches with chance p0; all 2^n paths are summed by the number of matches, so P(E ever
reaches 1/a) is computed and not estimated.
"""

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operating import operating_point

from wmengine.parts.statistics.sequential import SequentialTest, e_bh, is_futile, log10_e_value
from wmengine.parts.statistics.tails import binomial_log10_tail


@pytest.mark.parametrize("p0", [0.5, 0.1, 0.01, 0.001])
@pytest.mark.parametrize(("k", "n"), [(0, 0), (0, 1), (1, 1), (3, 20), (20, 20), (0, 100), (64, 100), (999, 1000)])
def test_e_is_the_mean_likelihood_ratio_over_the_rates_above_p0(k, n, p0):
    with mpmath.workdps(60):
        p = mpmath.mpf(p0)
        beta = mpmath.betainc(k + 1, n - k + 1, p, 1)
        expected = mpmath.log10(beta / ((1 - p) * p**k * (1 - p) ** (n - k)))
    assert log10_e_value(k, n, p0) == pytest.approx(float(expected), abs=1e-10 * max(1.0, abs(float(expected))))


@given(n=st.integers(1, 2000), p0=st.floats(1e-4, 0.9))
def test_misses_are_never_evidence(n, p0):
    assert log10_e_value(0, n, p0) <= 1e-12


@given(n=st.integers(1, 500), k=st.integers(0, 499), p0=st.floats(1e-3, 0.9))
def test_a_match_never_lowers_the_evidence(n, k, p0):
    k = min(k, n - 1)
    assert log10_e_value(k + 1, n, p0) >= log10_e_value(k, n, p0) - 1e-9


@pytest.mark.parametrize("p0", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("chunk", [1, 8, 32])
@pytest.mark.parametrize("log10_bar", [0.5, 1.0, 2.0, 4.0])
def test_a_stranger_is_accused_with_at_most_the_promised_chance(p0, chunk, log10_bar):
    proven, _ = operating_point(p0, p0, 100, log10_bar, chunk, chunk)
    assert 0.0 < proven <= 10.0**-log10_bar


def test_the_tail_at_the_stopped_n_would_accuse_too_many():
    """Why e-values: stopping when the fixed-n tail first reaches a is no test of level a."""
    p0, total, a = 0.1, 100, 0.01
    alive = np.zeros(total + 1)
    alive[0] = 1.0
    accused = 0.0
    for asked in range(1, total + 1):
        alive[1:] = alive[1:] * (1 - p0) + alive[:-1] * p0
        alive[0] *= 1 - p0
        for k in range(asked + 1):
            if alive[k] > 0 and binomial_log10_tail(k, asked, p0) <= math.log10(a):
                accused += alive[k]
                alive[k] = 0.0
    assert accused > 4 * a


def test_power_and_cost_are_as_promised():
    """At C = 10 and a bar of 2^64: every perfect copy is proven, and strangers cost about a fifth of the triggers."""
    bar = 64 * math.log10(2)
    assert operating_point(1.0, 0.1, 100, bar, 1, 1) == (1.0, pytest.approx(21, abs=0.5))
    proven, asked = operating_point(0.8, 0.1, 100, bar, 1, 1)
    assert proven > 0.99
    assert asked == pytest.approx(33, abs=3)
    proven, asked = operating_point(0.1, 0.1, 100, bar, 1, 1)
    assert asked < 25


def test_giving_up_misses_few_copies_that_keep_half_their_triggers():
    missed = 0.0
    alive = np.zeros(101)
    alive[0] = 1.0
    for asked in range(1, 101):
        alive[1:] = (alive[1:] + alive[:-1]) / 2
        alive[0] /= 2
        for k in range(asked + 1):
            if alive[k] > 0 and is_futile(k, asked, 0.1):
                missed += alive[k]
                alive[k] = 0.0
    assert 0.0 < missed <= 1e-3


def test_nothing_is_futile_where_a_stranger_matches_as_often_as_a_copy():
    assert not is_futile(0, 1000, 0.5)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=12))
def test_p_never_rises_as_answers_come_in(steps):
    test = SequentialTest(0.1, 1000)
    last = 0.0
    for matched, missed in steps:
        test.count(matched, matched + missed)
        assert test.log10_p <= last
        last = test.log10_p
    assert test.log10_p == min(0.0, -test.log10_e_peak)


def test_more_answers_than_triggers_are_refused():
    test = SequentialTest(0.1, 10)
    with pytest.raises(ValueError, match="do not fit"):
        test.count(5, 11)
    with pytest.raises(ValueError, match="do not fit"):
        test.count(6, 5)


def test_e_bh_equals_its_definition():
    rng = np.random.default_rng(1)
    for _ in range(50):
        log10_e = list(rng.normal(1.0, 2.0, size=7))
        q = e_bh(log10_e, 9)
        for alpha in (0.01, 0.05, 0.2, 0.9):
            # reject the k largest, k the most for which the k-th largest e is at least m / (alpha k)
            ordered = sorted(log10_e, reverse=True)
            k = max((j for j in range(1, 8) if 10 ** ordered[j - 1] >= 9 / (alpha * j)), default=0)
            assert {i for i in range(7) if q[i] <= alpha} == {log10_e.index(value) for value in ordered[:k]}
    with pytest.raises(ValueError, match="only 1 tests"):
        e_bh([1.0, 2.0], 1)
