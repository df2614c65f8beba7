"""When a mark counts as proven, when an attack failed anyway, and the rule of others that stands beside ours."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from benchmarks.robustness.cells import Row

PROVEN = -9.0  # log10 p below which a mark is proven
MOST_LOSS = 5.0  # points: whoever loses more has no product


def outcome(row: Row) -> str:
    """What an attack came to: "proven", the mark is; "failed anyway", it is not, but the copy is worth nothing;
    "removed", the thief got away with it."""
    if row.log10_p is None or row.loss is None:
        raise ValueError(f"the cell {row.attack!r} of {row.preset!r} has no mark, so no attack on it came to anything")
    return "proven" if row.log10_p < PROVEN else "failed anyway" if row.loss > MOST_LOSS else "removed"


def share(row: Row) -> float:
    """The matched share of the mark's symbols; 0 where a copy has nothing to read it from."""
    return row.matched / row.total if row.matched and row.total else 0.0


def sok_threshold(nulls: Iterable[Row]) -> float | None:
    """The matched share above which SoK's rule says that a mark is there: the 95 % quantile of a normal law fitted to
    models without it. None where there are fewer than two.

    Lukas, Jiang, Li, Kerschbaum, "SoK: How Robust is Image Classification Deep Neural Network Watermarking?", 2022. A
    threshold at p < 0.05 accuses one stranger in twenty, and the fit says nothing of the strangers that were not there.
    """
    shares = [share(row) for row in nulls]
    if len(shares) < 2:
        return None
    return statistics.fmean(shares) + statistics.NormalDist().inv_cdf(0.95) * statistics.stdev(shares)


def sok_success(row: Row, threshold: float) -> bool:
    """Whether an attack succeeds by SoK's rule: the mark falls to the threshold, and under 5 points of accuracy go."""
    return share(row) <= threshold and (row.loss is None or abs(row.loss) < MOST_LOSS)
