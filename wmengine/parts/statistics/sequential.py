"""The sequential test: ask a few triggers at a time, stop as soon as the answer is clear, and pay nothing for looking.

The evidence is an e-value: what a gambler holds who starts with 1 and bets, before each answer, that the suspect's rate
of matches q is above a stranger's p0, his stake spread evenly over q in [p0, 1]. Against a stranger no such gambler
gains on average, whenever he stops (Ville's inequality): P(E ever reaches 1/a) <= a for every a. So 1/max E is a
p-value, however the stopping was chosen. Misses are never evidence: no q below p0 is bet on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from wmengine.parts.statistics.tails import binomial_log10_point, binomial_log10_tail

FUTILE_RATE = 0.5  # q_min: copies that keep fewer of their triggers may be given up
FUTILE_BETA = 1e-3  # the chance that a copy at q_min is given up


@lru_cache(maxsize=1 << 14)  # as most strangers of a scan have the same few counts
def log10_e_value(k: int, n: int, p0: float) -> float:
    """log10 E after k matches of n answers: the mean over q in [p0, 1] of q^k (1−q)^(n−k) / (p0^k (1−p0)^(n−k)).

    The integral is a beta function times P(Bin(n+1, p0) <= k), and 1/B(k+1, n−k+1) is n+1 times a binomial
    coefficient, so that E = P(Bin(n+1, p0) <= k) / ((n+1) (1−p0) P(Bin(n, p0) = k)). Raises ValueError unless
    0 <= k <= n and 0 < p0 < 1.
    """
    if not 0.0 < p0 < 1.0:
        raise ValueError(f"p0 must be between 0 and 1, and it is {p0}")
    below = binomial_log10_tail(n + 1 - k, n + 1, 1.0 - p0)
    return below - math.log10(n + 1) - math.log10(1.0 - p0) - binomial_log10_point(k, n, p0)


def is_futile(k: int, n: int, p0: float, rate: float = FUTILE_RATE, beta: float = FUTILE_BETA) -> bool:
    """Whether k matches of n answers are 1/beta times as likely from a stranger as from a copy that keeps `rate`.

    Giving up can never convict anybody; its price is that at most a share beta of the copies that keep `rate` of
    their triggers is missed (Wald, "Sequential Tests of Statistical Hypotheses", 1945), and more of those below.
    Never where a stranger's chance is as high as `rate`: nothing would tell the two apart.
    """
    if rate <= p0:
        return False
    against = -k * math.log(rate / p0) - (n - k) * math.log((1.0 - rate) / (1.0 - p0))
    return against >= -math.log(beta)


@dataclass
class SequentialTest:
    """One suspect, one watermark: feed it answers, ask it whether to go on.

    total: triggers of the watermark. The decision is None while asking may go on.
    """

    p0: float
    total: int
    rate: float = FUTILE_RATE
    beta: float = FUTILE_BETA
    matched: int = 0
    asked: int = 0
    log10_e: float = 0.0
    log10_e_peak: float = 0.0
    peak: tuple[int, int] = (0, 0)  # matched and asked where E was highest

    def count(self, matched: int, asked: int) -> None:
        """The next `asked` answers held `matched` matches; abstentions are answers that do not match."""
        if not 0 <= matched <= asked or self.asked + asked > self.total:
            raise ValueError(f"{matched} matches of {asked} more answers do not fit {self.asked} of {self.total}")
        self.matched += matched
        self.asked += asked
        self.log10_e = log10_e_value(self.matched, self.asked, self.p0)
        if self.log10_e > self.log10_e_peak:
            self.log10_e_peak, self.peak = self.log10_e, (self.matched, self.asked)

    @property
    def decision(self) -> str | None:
        """ "futile", "exhausted" (all triggers asked), or None: ask on."""
        if self.asked == self.total:
            return "exhausted"
        return "futile" if is_futile(self.matched, self.asked, self.p0, self.rate, self.beta) else None

    @property
    def log10_p(self) -> float:
        """log10 of min(1, 1 / max E): valid at any time, whatever decided when to stop."""
        return min(0.0, -self.log10_e_peak)


def e_bh(log10_e: list[float], tests: int) -> list[float]:
    """q-values of e-values by e-BH (Wang and Ramdas 2022): reported q <= a keeps the false discovery rate below a.

    log10_e: of the suspects so far; tests: m, fixed beforehand, at least as many (those not listed count as E = 0). The
    e-values may depend on each other in any way. Values are at most 1.
    """
    if tests < len(log10_e):
        raise ValueError(f"there are {len(log10_e)} e-values and only {tests} tests")
    order = sorted(range(len(log10_e)), key=log10_e.__getitem__, reverse=True)
    values = [1.0] * len(log10_e)
    least = 1.0
    for place in range(len(order), 0, -1):
        index = order[place - 1]
        log10_q = math.log10(tests) - math.log10(place) - log10_e[index]
        least = min(least, 10.0 ** min(0.0, log10_q))
        values[index] = least
    return values
