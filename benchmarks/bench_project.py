"""`project`, forward and accumulating adjoint: a dense keyed matrix drawn inside the kernel instead of being stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.harness import Aim, Case, Contender, quantity
from benchmarks.projections import EAGER, keyed_pair, stored_pair


class Size(NamedTuple):
    """`weights` projected to `bits` rows of `kind`."""

    weights: int
    bits: int
    kind: str


SIZES = [
    *(Size(1 << log2, 256, kind) for kind in ("rademacher", "gaussian") for log2 in (12, 16, 20)),
    Size(1 << 24, 64, "rademacher"),
]
# Aims for two AVX2 cores; the arithmetic of Box and Muller leaves the Gaussian matrix none.
AIMS = {Size(1 << 20, 256, "rademacher"): [Aim(EAGER, 5.0)]}
QUICK_SIZES = [Size(5000, 40, "rademacher"), Size(5000, 40, "gaussian")]


def test_project(size: Size, compare: Callable[[Case], None], device: str, quick: bool) -> None:
    torch.manual_seed(1)
    weights, residual = torch.randn(size.weights, device=device), torch.randn(size.bits, device=device)
    gradient = torch.zeros_like(weights)
    stored, left_out = stored_pair(weights, torch.zeros_like(weights), residual, quick)
    compare(
        Case(
            operator="project",
            what=f"project, {size.kind}, forward + accumulating adjoint",
            size=f"{quantity(size.weights)} weights, T={size.bits}",
            bytes_moved=3 * 4 * size.weights,
            ours=keyed_pair(size.kind, weights, gradient, residual),
            floor=Contender("copy", lambda: gradient.copy_(weights)),
            peers=stored,
            left_out=left_out,
            aims=AIMS.get(size, []),
            headline=size.weights == 1 << 20,
            operations=(2 if size.kind == "rademacher" else 4) * size.weights * size.bits,  # additions; products too
            axis=("weights", size.weights) if size.bits == 256 else None,
        )
    )
