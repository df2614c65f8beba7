"""`project`, forward and adjoint: a dense keyed matrix drawn inside the kernel instead of being stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.harness import Aim, Case
from benchmarks.projections import EAGER, compare_pair


class Size(NamedTuple):
    """`weights` projected to `bits` rows of `kind`."""

    kind: str
    weights: int
    bits: int


SIZES = [
    *(Size(kind, 1 << log2, 256) for kind in ("rademacher", "gaussian") for log2 in (12, 16, 20)),
    Size("rademacher", 1 << 24, 64),
]
# Aims for two AVX2 cores; the arithmetic of Box and Muller leaves the Gaussian matrix none.
AIMS = {Size("rademacher", 1 << 20, 256): [Aim(EAGER, 5.0)]}
QUICK_SIZES = [Size("rademacher", 5000, 40), Size("gaussian", 5000, 40)]


def test_project(size: Size, compare: Callable[[Case], None], device: str) -> None:
    operations = (2 if size.kind == "rademacher" else 4) * size.weights * size.bits  # additions; products too
    headline, aims = size.weights == 1 << 20, AIMS.get(size, [])
    compare_pair(compare, device, *size, aims=aims, headline=headline, operations=operations)
