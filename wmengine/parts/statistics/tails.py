"""Exact binomial tails in log space, and what is paid for every try: the numbers behind a verdict.

A stranger matches each symbol with chance p0, so k or more matches of n have the chance P(Bin(n, p0) >= k). It goes
down to 10^-10000 and further, so it is computed as its log10: the point probability by Loader's saddle-point expansion
("Fast and accurate computation of binomial probabilities", 2000), and the sum by the incomplete beta function's
continued fraction.
"""

from __future__ import annotations

import math
import operator
from functools import lru_cache

MAX_TRIALS = 10**12

_LN10 = math.log(10.0)


def binomial_log10_tail(k: int, n: int, p: float) -> float:
    """log10 P(X >= k) for X ~ Bin(n, p), within 1e-10 · max(1, |log10 p-value|).

    k <= 0 gives 0.0 and an impossible event -inf. Raises ValueError for k > n, n < 0, n > 10^12 or p outside [0, 1].
    """
    k, n, p = _arguments(k, n, p)
    if k > n:
        raise ValueError(f"k must be at most n, and {k} > {n}")
    return _tail(k, n, p)


def binomial_log10_point(k: int, n: int, p: float) -> float:
    """log10 P(X = k) for X ~ Bin(n, p), 0 <= k <= n: what a randomised p-value needs besides the tail.

    The tail alone is discrete; P(X > k) + U · P(X = k) with U uniform on [0, 1] is exactly uniform under the null.
    """
    k, n, p = _arguments(k, n, p)
    if not 0 <= k <= n:
        raise ValueError(f"k must be from 0 to n = {n}, and it is {k}")
    return _log_point(k, n, p, 1.0 - p) / _LN10 + 0.0


def threshold(n: int, p: float, log10_alpha: float) -> int | None:
    """The least k with log10 P(Bin(n, p) >= k) <= log10_alpha; None where even n matches do not reach it."""
    _, n, p = _arguments(0, n, p)
    if math.isnan(log10_alpha):
        raise ValueError("log10_alpha must be a number, and it is NaN")
    if _tail(n, n, p) > log10_alpha:
        return None
    low, high = 0, n  # the tail falls with k, and at `high` it is known to be low enough
    while low < high:
        middle = (low + high) // 2
        if _tail(middle, n, p) <= log10_alpha:
            high = middle
        else:
            low = middle + 1
    return high


def binomial_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """(low, high) of a rate, within [0, 1]: Wilson's score interval (1927), for match rates and accuracies."""
    successes, trials = operator.index(successes), operator.index(trials)
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"successes must be from 0 to trials >= 1, and they are {successes} of {trials}")
    z = _normal_quantile(level)
    rate, square = successes / trials, z * z / trials
    centre = (rate + square / 2.0) / (1.0 + square)
    half = math.sqrt(square * (rate * (1.0 - rate) + square / 4.0)) / (1.0 + square)
    # At the ends the formula gives 0 and 1 exactly, but not in floating point.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


def paired_difference_interval(
    only_first: int, only_second: int, n: int, level: float = 0.95
) -> tuple[float, float, float]:
    """(difference, low, high) of two success rates measured on the same n items, as the accuracy cost of a mark is.

    only_first: items that only the first gets right; only_second: only the second. The difference is (only_first −
    only_second) / n; the interval is Tango's score interval (Statistics in Medicine 17, 1998): every δ that a score
    test does not reject. It keeps its level where items disagree rarely and on one side; Wald's shrinks to nothing.
    """
    only_first, only_second, n = operator.index(only_first), operator.index(only_second), operator.index(n)
    if min(only_first, only_second) < 0 or n < 1 or only_first + only_second > n:
        raise ValueError(f"only_first + only_second must be at most n >= 1: {only_first} + {only_second} and {n}")
    z = _normal_quantile(level)

    def bound(target: float) -> float:
        low, high = -1.0, 1.0  # the score falls with δ
        for _ in range(60):
            middle = (low + high) / 2.0
            if _paired_score(only_first, only_second, n, middle) > target:
                low = middle
            else:
                high = middle
        return (low + high) / 2.0

    return (only_first - only_second) / n, bound(z), bound(-z)


def _paired_score(first: int, second: int, n: int, delta: float) -> float:
    """Tango's statistic of the hypothesis that the difference is `delta`, asymptotically standard normal under it."""
    difference = first - second - n * delta
    # q: the likeliest rate of only_second under the hypothesis, the root of 2n·q² + linear·q + constant.
    linear = (2 * n - first + second) * delta - first - second
    constant = -second * delta * (1.0 - delta)
    q = (math.sqrt(max(0.0, linear * linear - 8.0 * n * constant)) - linear) / (4.0 * n)
    variance = n * (2.0 * q + delta * (1.0 - delta))
    if variance <= 0.0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / math.sqrt(variance)


def _arguments(k: int, n: int, p: float) -> tuple[int, int, float]:
    k, n, p = operator.index(k), operator.index(n), float(p)
    if not 0 <= n <= MAX_TRIALS:
        raise ValueError(f"n must be from 0 to {MAX_TRIALS}, and it is {n}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must be from 0 to 1, and it is {p}")
    return k, n, p


def _normal_quantile(level: float) -> float:
    from statistics import NormalDist  # its own imports take 10 ms, and verdicts do not need it

    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be between 0 and 1, and it is {level}")
    return NormalDist().inv_cdf(0.5 + level / 2.0)


@lru_cache(maxsize=1 << 14)  # in a scan most suspects are strangers, with the same few counts
def _tail(k: int, n: int, p: float) -> float:
    if k <= 0 or p == 1.0:
        return 0.0
    if p == 0.0:
        return -math.inf
    q = 1.0 - p
    if k > n * p:
        return min(0.0, _log_upper(k, n, p, q) / _LN10)
    # Below the mean the tail is near 1, and what falls short of it is the upper tail of the failures.
    return math.log1p(-math.exp(_log_upper(n - k + 1, n, q, p))) / _LN10


def _log_upper(k: int, n: int, p: float, q: float) -> float:
    """ln P(X >= k) for k above the mean: I_p(k, n−k+1) = P(X = k) · q · (continued fraction)."""
    return _log_point(k, n, p, q) + math.log(q * _beta_fraction(k, n - k + 1, p, q))


def _log_point(k: int, n: int, p: float, q: float) -> float:
    """ln P(X = k), with q = 1 − p given, so that a caller who swaps the two loses no digits of the smaller."""
    if p == 0.0 or q == 0.0:
        return 0.0 if k == (0 if p == 0.0 else n) else -math.inf
    log_p = math.log(p) if p < 0.5 else math.log1p(-q)
    log_q = math.log(q) if q < 0.5 else math.log1p(-p)
    if k == 0:
        return n * log_q
    if k == n:
        return n * log_p
    # Loader's equation 4: the factorials' main parts cancel on paper, so that nothing cancels in floating point.
    stirling = _stirling_error(n) - _stirling_error(k) - _stirling_error(n - k)
    deviances = _deviance(k, n, p, log_p) + _deviance(n - k, n, q, log_q)
    return stirling - deviances + 0.5 * (math.log(n / k / (n - k)) - math.log(2.0 * math.pi))


def _stirling_error(n: int) -> float:
    """ln n! − ln(√(2πn) (n/e)^n), n >= 1; the series' first term left out is below 1e-15 for n > 15."""
    if n <= 15:
        return math.lgamma(n + 1.0) - (n + 0.5) * math.log(n) + n - 0.5 * math.log(2.0 * math.pi)
    square = float(n) * n
    return (1 / 12 - (1 / 360 - (1 / 1260 - (1 / 1680 - 1 / 1188 / square) / square) / square) / square) / n


def _deviance(x: int, n: int, p: float, log_p: float) -> float:
    """x ln(x / np) + np − x >= 0, x >= 1: half the deviance; near x = np, where this cancels, by Loader's series."""
    mean = n * p
    difference = x - mean
    if abs(difference) >= 0.1 * (x + mean):
        return x * (math.log(x / n) - log_p) - difference  # log p apart, because np may underflow
    ratio = difference / (x + mean)
    total, term, odd = difference * ratio, 2.0 * x * ratio, 1
    while True:
        term *= ratio * ratio
        odd += 2
        longer = total + term / odd
        if longer == total:
            return total
        total = longer


def _beta_fraction(a: int, b: int, x: float, y: float) -> float:
    """I_x(a, b) · a B(a, b) / (x^a y^b), y = 1 − x, for a > (a+b−1)·x: the even part of the continued fraction.

    Didonato and Morris, "Algorithm 708", ACM TOMS 18 (1992), equation 9, by Lentz's method. Every term is positive, and
    as b is an integer the fraction ends after b terms where it has not converged before (about √a near the mean).
    """
    excess = (a + 1) * y - (b - 1) * x  # their λ + 1, written so that a small y keeps its digits
    fraction = upper = a * excess / (a + 1)
    lower = 0.0
    for m in range(1, b):
        odd = a + 2 * m - 1
        weight = m * (b - m) * x
        alpha = (a + m - 1) / odd * ((a + b + m - 1) / odd) * weight * x
        beta = m + weight / odd + (a + m) / (odd + 2) * (excess + m * (1.0 + y))
        lower = 1.0 / (beta + alpha * lower)
        upper = beta + alpha / upper
        step = upper * lower
        fraction *= step
        if abs(step - 1.0) < 1e-15:
            break
    return a / fraction
