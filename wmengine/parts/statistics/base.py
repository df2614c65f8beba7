"""What every statistic gets and gives: looks at observed symbols go in, a p-value and its evidence come out.

A look holds, of each symbol, whether it was read, and the level at which the expected one stood among all that it could
have been: an integer from -LEVELS to LEVELS, in tenths of a standard deviation. Given everything that is not the key,
the level of the expected symbol is one of those in its row's histogram, each with the chance of its share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wmengine.ops.reference import MOST_LEVEL

LEVELS = MOST_LEVEL  # three standard deviations


@dataclass(frozen=True, eq=False)
class Look:
    """Some symbols as they were seen: how many match, and at which level of its row's histogram each expected one is.

    at: int [n]; histogram: int [n, 2 LEVELS + 1], how many of the possible symbols have each level. A row that says
    nothing (no answer, a tie) matches nothing and has all its symbols at level 0.
    """

    matched: int
    at: NDArray[np.integer[Any]]
    histogram: NDArray[np.integer[Any]]

    def __len__(self) -> int:
        return len(self.at)


@dataclass(frozen=True)
class Evidence:
    """All that a p-value is computed from, so that anybody can do it again: p = min(1, p_test / 10^log10_share).

    statistic and test say what p_test is (docs/design.md, section 8): "matches" with "fixed" is P(Bin(asked, chance) >=
    matched), with "sequential" 1 / E(matched, asked) where that e-value was highest; "soft" is P(S >= sum of the levels
    in `rows`) in the fixed test, or 1 where Chernoff's bound on it at none of the four rates is below 1/100, and 1 / E
    of those rows in the sequential one. rows: of "soft", sorted, for each symbol
    the expected one's level and then pairs of a level and how many of the possible symbols have it. log10_share: of the
    share of the evidence that the hypothesis had which counts.
    """

    statistic: str
    test: str
    matched: int
    asked: int
    chance: float
    log10_share: float
    rows: tuple[tuple[int, ...], ...] | None = None


class Test(Protocol):
    """One hypothesis of one mark and one suspect: feed it looks, ask it whether to go on.

    total: symbols that the test is of; those not asked after all are misses. decision: "futile", "exhausted", or None
    while asking may go on. log10_p is valid at any time, log10_e (of a sequential test) too.
    """

    @property
    def total(self) -> int: ...

    @property
    def matched(self) -> int: ...

    @property
    def asked(self) -> int: ...

    def add(self, look: Look) -> None: ...

    @property
    def decision(self) -> str | None: ...

    @property
    def log10_p(self) -> float: ...

    @property
    def log10_e(self) -> float | None: ...

    def evidence(self, log10_share: float) -> Evidence: ...


class Statistic(Protocol):
    """identifier: name and version; it enters the mark's identity and so its commitment."""

    @property
    def identifier(self) -> str: ...

    def begin(self, chance: float, total: int, sequential: bool) -> Test:
        """A test of `total` symbols that a stranger matches with `chance` each."""
        ...
