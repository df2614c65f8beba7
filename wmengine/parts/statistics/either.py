"""Two statistics of the same symbols, each with half of the evidence: p = min(1, 2·min(p1, p2)), for any dependence."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from wmengine.parts.statistics.base import Evidence, Look, Statistic, Test
from wmengine.parts.statistics.matches import Matches
from wmengine.parts.statistics.soft import Soft

_LOG10_HALF = math.log10(0.5)
_ROUNDING = 1e-9  # what the last digits of equal tails may differ by


@dataclass(frozen=True)
class Either:
    """The better of two, both paid (Bonferroni with weights fixed before any look)."""

    first: Statistic = field(default_factory=Soft)
    second: Statistic = field(default_factory=Matches)

    @property
    def identifier(self) -> str:
        return f"{self.first.identifier} or {self.second.identifier}"

    def begin(self, chance: float, total: int, sequential: bool) -> Test:
        return _EitherTest(*(each.begin(chance, total, sequential) for each in (self.first, self.second)))


class _EitherTest:
    def __init__(self, first: Test, second: Test) -> None:
        self._tests = first, second
        self.total = second.total

    def add(self, look: Look) -> None:
        for test in self._tests:
            test.add(look)

    @property
    def matched(self) -> int:
        return self._tests[1].matched

    @property
    def asked(self) -> int:
        return self._tests[1].asked

    @property
    def decision(self) -> str | None:
        decisions = [test.decision for test in self._tests]
        if None in decisions:
            return None
        return "exhausted" if "exhausted" in decisions else "futile"

    @property
    def log10_p(self) -> float:
        return min(0.0, self._better.log10_p - _LOG10_HALF)

    @property
    def log10_e(self) -> float | None:
        found = [test.log10_e for test in self._tests]
        if any(each is None for each in found):
            return None
        first, second = (float(each) for each in found if each is not None)
        top = max(first, second)
        return top + math.log10(0.5 * (10.0 ** (first - top) + 10.0 ** (second - top)))

    def evidence(self, log10_share: float) -> Evidence:
        return self._better.evidence(log10_share + _LOG10_HALF)

    @property
    def _better(self) -> Test:
        """Of equals the second, whose evidence is a few numbers."""
        first, second = self._tests
        return first if first.log10_p < second.log10_p - _ROUNDING else second
