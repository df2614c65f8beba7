"""The soft statistic: not only whether the expected symbol was read, but how high it stood among all possible ones.

Given all that is not the key, symbol t's level is drawn from the histogram of its row, independently of the others, so
the law of the sum S of the expected symbols' levels is known exactly, whatever the suspect is. Levels are clipped row
by row: one weight scaled up, or one answer, cannot outvote the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wmengine.parts.statistics.base import LEVELS, Evidence, Look, Test

RATES = (0.01, 0.03, 0.1, 0.3)  # per level: 0.1 to 3 per standard deviation, the e-value's mixture
_LEVEL = np.arange(-LEVELS, LEVELS + 1)
_TILTS = np.exp(np.outer(_LEVEL, (*RATES, 0.0)))  # [levels, rates and none]
_LN10 = math.log(10.0)
_STEEPEST = 40.0  # per level: nothing is left below the highest, so that even a sum of all of them does not underflow
# A stranger's sum needs no exact tail: where Chernoff's bound at the four rates is above this, p counts as 1.
_WORTH_LOOKING = -2.0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Soft:
    """Fixed: p = P(S >= s), by direct convolution. Sequential: the mean over RATES of Π e^(r·level) / E e^(r·level)."""

    identifier = "soft/1"

    def begin(self, chance: float, total: int, sequential: bool) -> Test:
        return _SoftTest(chance, total, sequential)


class _SoftTest:
    def __init__(self, chance: float, total: int, sequential: bool) -> None:
        self.chance, self.total = chance, total
        self.matched = self.asked = 0
        self._sequential = sequential
        self._looks: list[Look] = []
        self._tail: float | None = None  # of the fixed test, once it was asked for
        self._ln_e, self._log10_e = [0.0] * len(RATES), 0.0
        self._peak, self._peak_looks = 0.0, 0  # log10 of the highest e-value, and after how many looks

    def add(self, look: Look) -> None:
        self.matched += look.matched
        self.asked += len(look)
        self._looks.append(look)
        self._tail = None
        mass = look.histogram @ _TILTS  # the last column is how many symbols are possible
        *expected, possible = np.log(mass).sum(axis=0).tolist()
        seen = int(look.at.sum())
        self._ln_e = [
            ln + rate * seen - each + possible for ln, rate, each in zip(self._ln_e, RATES, expected, strict=True)
        ]
        top = max(self._ln_e)
        self._log10_e = (top + math.log(sum(math.exp(ln - top) for ln in self._ln_e) / len(RATES))) / _LN10
        if self._sequential and self._log10_e > self._peak:
            self._peak, self._peak_looks = self._log10_e, len(self._looks)

    @property
    def decision(self) -> str | None:
        if self.asked == self.total:
            return "exhausted"
        # Given up while it has gained nothing: that convicts nobody.
        return "futile" if self._sequential and self._log10_e < math.log10(2.0) else None

    @property
    def log10_p(self) -> float:
        if self._sequential:
            return -self._peak
        if not self._looks or -max(self._ln_e) / _LN10 > _WORTH_LOOKING:
            return 0.0
        if self._tail is None:
            self._tail = soft_log10_tail(*_joined(self._looks))
        return self._tail

    @property
    def log10_e(self) -> float | None:
        return self._log10_e if self._sequential else None

    def evidence(self, log10_share: float) -> Evidence:
        looks = self._looks[: self._peak_looks] if self._sequential else self._looks
        matched, asked = sum(look.matched for look in looks), sum(map(len, looks))
        test = "sequential" if self._sequential else "fixed"
        rows = tuple(sorted(_rows(*_joined(looks)))) if looks else ()
        return Evidence("soft", test, matched, asked, self.chance, log10_share, rows)


def soft_log10_tail(at: NDArray[np.integer], histogram: NDArray[np.integer]) -> float:
    """log10 P(S >= Σ at), S a sum of independent levels, the level of row t drawn from histogram[t].

    at: int [n]; histogram: int [n, 61], counts of the levels -30 … 30. Each row's law is tilted by e^(r·level) with r
    such that the mean of S is what was seen, the tilted laws are convolved one by one, and the tilt is taken out of the
    tail again: all terms are positive, so p is right within a factor of 1 + 1e-9 down to any size (an FFT's error is
    absolute, and would end p at 1e-14).
    """
    total = int(at.sum())
    shares: Floats = histogram / histogram.sum(axis=1, keepdims=True)
    there = shares > 0.0
    highest = LEVELS - there[:, ::-1].argmax(axis=1)  # level of each row
    if total <= float((shares @ _LEVEL).sum()):
        return 0.0
    if total > int(highest.sum()):
        raise ValueError("the levels of the expected symbols are not among those of their rows")
    rate = _tilt(shares, highest, total)
    tilted = _tilted(shares, highest, rate)
    mass = tilted.sum(axis=1)
    tilted /= mass[:, None]
    law, start = np.ones(1), 0  # law[i] is the tilted chance of the sum start + i
    for row in tilted:
        (levels,) = np.nonzero(row)
        low, high = int(levels[0]), int(levels[-1])
        if len(levels) > 4:
            law = np.convolve(law, row[low : high + 1])
        else:
            wider = np.zeros(len(law) + high - low)
            for level in levels:
                wider[level - low : level - low + len(law)] += row[level] * law
            law = wider
        start += low - LEVELS
    beyond = law[total - start :]
    tail = float(beyond @ np.exp(-rate * np.arange(len(beyond))))
    ln = float(np.log(mass).sum()) + rate * float(highest.sum() - total) + math.log(tail)
    return min(0.0, ln / _LN10)


def _tilt(shares: Floats, highest: NDArray[np.integer], total: int) -> float:
    """The rate at which the tilted rows' mean sum is `total`, as good as it takes: any rate gives the same tail."""
    low, high = 0.0, _STEEPEST
    for _ in range(30):
        middle = (low + high) / 2.0
        tilted = _tilted(shares, highest, middle)
        mean = float(((tilted @ _LEVEL) / tilted.sum(axis=1)).sum())
        low, high = (middle, high) if mean < total else (low, middle)
    return low


def _tilted(shares: Floats, highest: NDArray[np.integer], rate: float) -> Floats:
    """Each row times e^(rate · (level − its highest level))."""
    tilted: Floats = shares * np.exp(rate * np.minimum(_LEVEL - highest[:, None], 0))
    return tilted


def _joined(looks: list[Look]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    at = np.concatenate([look.at for look in looks]).astype(np.int64)
    return at, np.concatenate([look.histogram for look in looks]).astype(np.int64)


def _rows(at: NDArray[np.int64], histogram: NDArray[np.int64]) -> list[tuple[int, ...]]:
    """For each symbol the expected one's level, then level, count, level, count …"""
    found = []
    for level, counts in zip(at.tolist(), histogram, strict=True):
        (present,) = np.nonzero(counts)
        pairs = zip((present - LEVELS).tolist(), counts[present].tolist(), strict=True)
        found.append((level, *(number for pair in pairs for number in pair)))
    return found
