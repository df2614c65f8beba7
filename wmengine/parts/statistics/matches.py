"""The number of matches: an exact binomial tail, or an e-value that may be looked at after every answer."""

from __future__ import annotations

from dataclasses import dataclass

from wmengine.parts.statistics.base import Evidence, Look, Test
from wmengine.parts.statistics.sequential import SequentialTest
from wmengine.parts.statistics.tails import binomial_log10_tail


@dataclass(frozen=True)
class Matches:
    """p = P(Bin(total, chance) >= matches); what is not answered is a miss."""

    identifier = "matches/1"

    def begin(self, chance: float, total: int, sequential: bool) -> Test:
        return _Sequential(chance, total) if sequential else _Fixed(chance, total)


class Counted:
    """How many of `total` symbols match, all of them asked."""

    log10_e = None

    def __init__(self, total: int) -> None:
        self.total = total
        self.matched = self.asked = 0

    def add(self, look: Look) -> None:
        self.matched += look.matched
        self.asked += len(look)

    @property
    def decision(self) -> str | None:
        return "exhausted" if self.asked == self.total else None


class _Fixed(Counted):
    def __init__(self, chance: float, total: int) -> None:
        super().__init__(total)
        self.chance = chance

    @property
    def log10_p(self) -> float:
        return binomial_log10_tail(self.matched, self.total, self.chance)

    def evidence(self, log10_share: float) -> Evidence:
        return Evidence("matches", "fixed", self.matched, self.total, self.chance, log10_share)


class _Sequential(SequentialTest):
    """`SequentialTest`, fed with looks."""

    def add(self, look: Look) -> None:
        self.count(look.matched, len(look))

    def evidence(self, log10_share: float) -> Evidence:
        return Evidence("matches", "sequential", *self.peak, self.p0, log10_share)
