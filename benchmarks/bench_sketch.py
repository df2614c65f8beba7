"""`sketch`, forward and adjoint: one pass over the weights each way, against copying the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.harness import COPYING, Aim, Case
from benchmarks.projections import COPY, EAGER, compare_pair


class Size(NamedTuple):
    """`weights` sketched to `bits` sums."""

    weights: int
    bits: int


SIZES = [
    *(Size(1 << log2, bits) for log2 in (22, 24) for bits in (64, 256, 4096)),
    *(Size(1 << log2, 256) for log2 in (12, 15, 18)),
    Size(1 << 18, 4096),
]
GPU_SIZES = [Size(1 << 28, bits) for bits in (256, 4096)]
QUICK_SIZES = [Size(5000, 40), Size(10000, 256)]
AIMS = {Size(1 << 22, 256): [Aim(COPY, 3.0), Aim(EAGER, 100.0)]}


def test_sketch(size: Size, compare: Callable[[Case], None], device: str) -> None:
    operations = 2 * size.weights  # one signed addition a weight each way
    headline = size.weights >= 1 << 22 and size.bits == 256
    given = {"aims": AIMS.get(size, []), "headline": headline, "operations": operations, "gpu_bound": COPYING}
    compare_pair(compare, device, "sketch", *size, **given)
