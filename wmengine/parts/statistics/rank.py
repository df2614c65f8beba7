"""The rank among null models: how many of those made without the marked one match as many symbols.

For symbols that the key does not draw (a model's own answers), no law says what a stranger matches. Where m networks of
the same task, made independently, are exchangeable with the suspect, (1 + those that match at least as many)/(m + 1) is
a p-value; it is never below 1/(m + 1), and whether they are exchangeable is the owner's word. So it ranks and never
proves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.parts.statistics.base import Evidence, Test
from wmengine.parts.statistics.matches import Counted

NULL_ANSWERS = "null_answers"  # the array of a mark that holds what null models [m, total] answer


@dataclass(frozen=True)
class Rank:
    """p = (1 + the null models with at least as many matches) / (m + 1)."""

    identifier = "rank/1"

    def begin_among(self, null: Sequence[int], total: int) -> Test:
        """A test of `total` symbols; null: the matches among them of m null models."""
        return _Rank(tuple(sorted(null)), total)


def null_matches(arrays: Mapping[str, NDArray[Any]], symbols: str, total: int) -> list[int]:
    """What each null model of a mark matches of its first `total` symbols."""
    found: list[int] = (arrays[NULL_ANSWERS][:, :total] == arrays[symbols][:total]).sum(axis=1).tolist()
    return found


class _Rank(Counted):
    def __init__(self, null: tuple[int, ...], total: int) -> None:
        super().__init__(total)
        self._null = null

    @property
    def log10_p(self) -> float:
        above = int(np.sum(np.asarray(self._null) >= self.matched)) if self.asked else len(self._null)
        return math.log10((1.0 + above) / (len(self._null) + 1.0))

    def evidence(self, log10_share: float) -> Evidence:
        least = 1.0 / (len(self._null) + 1.0)
        return Evidence("rank", "fixed", self.matched, self.total, least, log10_share, (self._null,))
