"""The soft statistic against brute force, against high precision, and against its own promise P(p <= a) <= a."""

import math
from itertools import pairwise, product

import mpmath
import numpy as np
import pytest

from wmengine.judging.looks import looks_of_bits, looks_of_labels
from wmengine.parts.statistics.base import LEVELS, Look
from wmengine.parts.statistics.either import Either
from wmengine.parts.statistics.soft import RATES, Soft, soft_log10_tail


def levels_of(scores):
    """The level of each entry in its row, as `match_counts` gives it."""
    z = (scores - scores.mean(axis=1, keepdims=True)) / scores.std(axis=1, keepdims=True)
    return np.clip(np.rint(10 * z), -LEVELS, LEVELS).astype(np.int64)


def histogram_of(levels):
    return np.stack([np.bincount(row + LEVELS, minlength=2 * LEVELS + 1) for row in levels])


def look(scores, labels):
    levels = levels_of(scores)
    rows = np.arange(len(scores))
    return Look(int((scores.argmax(axis=1) == labels).sum()), levels[rows, labels], histogram_of(levels))


@pytest.mark.parametrize("seed", range(20))
def test_the_tail_is_the_share_of_all_symbol_strings_that_do_as_well(seed):
    generator = np.random.default_rng(seed)
    levels = generator.integers(-LEVELS, LEVELS + 1, (5, 4))
    expected = levels.argsort(axis=1)[:, generator.integers(2, 4)]
    at = levels[np.arange(5), expected]
    as_good = sum(sum(each) >= at.sum() for each in product(*levels.tolist()))
    log10_p = soft_log10_tail(at, histogram_of(levels))
    if at.sum() <= levels.mean(axis=1).sum():
        assert log10_p == 0.0
    else:
        assert log10_p == pytest.approx(np.log10(as_good / 4**5), abs=1e-10)


def exact_log10_tail(at, histogram):
    """By one product of whole numbers, whose digit s is the number of symbol strings with the sum s."""
    strings = math.prod(histogram.sum(axis=1).tolist())
    base = 2 ** (strings.bit_length() + 1)
    law = math.prod(sum(times * base**level for level, times in enumerate(row)) for row in histogram.tolist())
    above = law // base ** (int(at.sum()) + LEVELS * len(at)) % (base - 1)  # the sum of the digits from there on
    return float(mpmath.log10(above) - mpmath.log10(strings))


@pytest.mark.parametrize("shift", [0.7, 1.0, 2.0, 6.0])
@pytest.mark.parametrize("classes", [2, 3, 10, 40])
def test_the_tail_is_right_down_to_any_size(classes, shift):
    generator = np.random.default_rng(classes)
    scores = generator.normal(size=(50, classes))
    labels = generator.integers(0, classes, 50)
    scores[np.arange(50), labels] += shift
    seen = look(scores, labels)
    assert seen.at.sum() > 0, "below its mean a sum counts as 1"
    exact = exact_log10_tail(seen.at, seen.histogram)
    assert soft_log10_tail(seen.at, seen.histogram) == pytest.approx(exact, rel=1e-9, abs=1e-9)


def test_all_bits_matching_are_worth_a_factor_of_two_each():
    bits = np.random.default_rng(0).integers(0, 2, 256).astype(np.uint8)
    (seen,) = looks_of_bits((2.0 * bits - 1.0) * np.random.default_rng(1).uniform(0.5, 2.0, 256), [bits])
    assert seen.matched == 256
    assert soft_log10_tail(seen.at, seen.histogram) == pytest.approx(-256 * np.log10(2), rel=1e-9)


def p_values(statistic, looks, sequential=False, chance=0.1):
    found = []
    for batches in looks:
        total = sum(map(len, batches))
        test = statistic.begin(chance, total, sequential)
        for batch in batches:
            test.add(batch)
        found.append(test.log10_p)
    return np.array(found)


def strangers(kind, generator, keys):
    """One network's answers, and looks at them with fresh labels, in batches of 16 and 8."""
    scores = {
        "trained": lambda: generator.normal(size=(96, 10)) * np.exp(generator.normal(size=(96, 1))),
        "certain": lambda: 20.0 * np.eye(10)[generator.integers(0, 10, 96)] + generator.normal(size=(96, 10)),
        "constant": lambda: np.tile(generator.normal(size=10), (96, 1)),
        "heavy": lambda: generator.standard_cauchy(size=(96, 10)),
    }[kind]()
    starts = [0, *range(16, 97, 8)]
    for _ in range(keys):
        labels = generator.integers(0, 10, 96)
        yield [look(scores[start:stop], labels[start:stop]) for start, stop in pairwise(starts)]


@pytest.mark.parametrize("kind", ["trained", "certain", "constant", "heavy"])
def test_a_stranger_reaches_no_level_more_often_than_it_says(kind):
    keys = 400
    looks = list(strangers(kind, np.random.default_rng(5), keys))
    for statistic, sequential in product((Soft(), Either()), (False, True)):
        found = p_values(statistic, looks, sequential)
        for level in (0.1, 0.01, 0.001):
            share = (found <= np.log10(level)).mean()
            assert share <= level + 4 * np.sqrt(level / keys), f"{statistic} {sequential}: P(p <= {level}) = {share}"


def test_bits_of_a_stranger_reach_no_level_more_often_than_they_say():
    generator = np.random.default_rng(6)
    y = generator.standard_t(2, size=256)
    keys = 3000
    looks = looks_of_bits(y, [generator.integers(0, 2, 256).astype(np.uint8) for _ in range(keys)])
    found = p_values(Either(), ([each] for each in looks), chance=0.5)
    for level in (0.1, 0.01, 0.001):
        assert (found <= np.log10(level)).mean() <= level + 4 * np.sqrt(level / keys)


def test_evidence_is_enough_to_compute_the_p_value_again():
    generator = np.random.default_rng(7)
    scores, labels = generator.normal(size=(64, 10)), generator.integers(0, 10, 64)
    scores[np.arange(64), labels] += 1.0
    for sequential in (False, True):
        test = Soft().begin(0.1, 64, sequential)
        for start in range(0, 64, 16):
            test.add(look(scores[start : start + 16], labels[start : start + 16]))
        evidence = test.evidence(-1.0)
        assert (evidence.statistic, evidence.test) == ("soft", "sequential" if sequential else "fixed")
        at = np.array([row[0] for row in evidence.rows])
        histogram = np.zeros((len(at), 2 * LEVELS + 1), np.int64)
        for number, row in enumerate(evidence.rows):
            for level, count in zip(row[1::2], row[2::2], strict=True):
                histogram[number, level + LEVELS] = count
        if sequential:
            products = [mpmath.mpf(1)] * len(RATES)
            for level, counts in zip(at.tolist(), histogram.tolist(), strict=True):
                for place, rate in enumerate(RATES):
                    mean = mpmath.fsum(
                        times * mpmath.e ** (rate * (column - LEVELS)) for column, times in enumerate(counts) if times
                    ) / sum(counts)
                    products[place] *= mpmath.e ** (rate * level) / mean
            again = -mpmath.log10(sum(products) / len(RATES))
        else:
            again = exact_log10_tail(at, histogram)
        assert test.log10_p == pytest.approx(float(again), rel=1e-9)


def test_evidence_does_not_tell_which_symbol_is_which():
    bits = np.array([0, 1, 1, 0], np.uint8)
    y = np.array([-1.0, 2.0, 0.5, -1.5])
    (first,) = looks_of_bits(y, [bits])
    (second,) = looks_of_bits(-y[::-1], [1 - bits[::-1]])
    rows = []
    for seen in (first, second):
        test = Soft().begin(0.5, 4, False)
        test.add(seen)
        rows.append(test.evidence(0.0).rows)
    assert rows[0] == rows[1]


def test_a_single_huge_weight_cannot_outvote_the_others():
    generator = np.random.default_rng(8)
    bits = generator.integers(0, 2, 256).astype(np.uint8)
    y = 2.0 * bits - 1.0
    whole = Soft().begin(0.5, 256, False)
    whole.add(looks_of_bits(y, [bits])[0])
    y[3] *= -1e9
    scaled = Soft().begin(0.5, 256, False)
    scaled.add(looks_of_bits(y, [bits])[0])
    assert scaled.log10_p < whole.log10_p + 8


def test_what_says_nothing_matches_nothing_and_weighs_nothing():
    (seen,) = looks_of_bits(np.array([1.0, 0.0, np.nan, np.inf, 1e-9, 1.0, 2.0]), [np.ones(7, np.uint8)])
    assert seen.matched == 3
    assert seen.at.tolist() == [10, 0, 0, 0, 0, 10, 20]
    (seen,) = looks_of_labels(np.array([3, -1, 12]), [np.array([3, 3, 12])], 10)
    assert seen.matched == 1
    assert seen.at.tolist() == [30, 0, 0]
    assert seen.histogram.sum(axis=1).tolist() == [10, 10, 10]


def test_labels_alone_say_as_much_as_their_matches():
    generator = np.random.default_rng(9)
    labels = generator.integers(0, 10, 100)
    named = np.where(generator.random(100) < 0.5, labels, generator.integers(0, 10, 100))
    (seen,) = looks_of_labels(named, [labels], 10)
    soft, either = Soft().begin(0.1, 100, False), Either().begin(0.1, 100, False)
    soft.add(seen)
    either.add(seen)
    assert soft.log10_p == pytest.approx(either.log10_p - np.log10(2.0), rel=0.05)
    assert either.evidence(0.0).statistic == "matches"
