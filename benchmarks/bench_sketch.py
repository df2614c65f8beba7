"""`sketch`, forward and accumulating adjoint: one pass over the weights each way, against copying the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.harness import Aim, Case, Contender, quantity
from benchmarks.projections import EAGER, keyed_pair, stored_pair


class Size(NamedTuple):
    """`weights` sketched to `bits` sums."""

    weights: int
    bits: int


SIZES = [
    *(Size(1 << 22, bits) for bits in (64, 256, 4096)),
    *(Size(1 << 24, bits) for bits in (64, 256, 4096)),
    *(Size(1 << log2, 256) for log2 in (12, 15, 18)),
    Size(1 << 18, 4096),
]
QUICK_SIZES = [Size(5000, 40), Size(10000, 256)]
COPY = "copy"
AIMS = {Size(1 << 22, 256): [Aim(COPY, 3.0), Aim(EAGER, 100.0)]}
HEADLINES = [Size(1 << 22, 256), Size(1 << 24, 256)]


def test_sketch(size: Size, compare: Callable[[Case], None], device: str, quick: bool) -> None:
    torch.manual_seed(1)
    weights, residual = torch.randn(size.weights, device=device), torch.randn(size.bits, device=device)
    gradient = torch.zeros_like(weights)
    stored, left_out = stored_pair(weights, torch.zeros_like(weights), residual, quick)
    compare(
        Case(
            operator="sketch",
            what="sketch, forward + accumulating adjoint",
            size=f"{quantity(size.weights)} weights, T={size.bits}",
            bytes_moved=3 * 4 * size.weights,
            ours=keyed_pair("sketch", weights, gradient, residual),
            floor=Contender(COPY, lambda: gradient.copy_(weights)),
            peers=stored,
            left_out=left_out,
            aims=AIMS.get(size, []),
            headline=size in HEADLINES,
            operations=2 * size.weights,  # one signed addition a weight each way
            axis=("weights", size.weights) if size.bits == 256 else None,
        )
    )
