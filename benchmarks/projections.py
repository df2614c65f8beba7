"""Projections, forward and adjoint: our keyed pair, drawn inside the kernel, beside a stored matrix.

On a CPU the adjoint adds to a gradient that is there; on a GPU it writes one, to which autograd adds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import free_memory
from benchmarks.harness import Case, Contender, Run, byte_size, compiled, quantity
from wmengine import ops
from wmengine.ops import torch_ops

COPY = "copy"
EAGER = "stored matrix, eager torch"
COMPILED = "stored matrix, torch.compile"
LARGEST_MATRIX = 5_000_000_000
KEY = 0x1234_5678_9ABC_DEF0


def compare_pair(
    compare: Callable[[Case], None], device: str, kind: str, weights: int, bits: int, **others: Any
) -> None:
    """y = X w and Xᵀ residual, X of `bits` rows; `kind` is sketch, rademacher or gaussian."""
    torch.manual_seed(1)
    w, residual = torch.randn(weights, device=device), torch.randn(bits, device=device)
    gradient, for_peers = torch.zeros_like(w), torch.zeros_like(w)
    peers, left_out, adds = [], {}, device == "cpu"
    try:
        matrix = stored_signs(bits, weights, device)
    except ValueError as reason:
        left_out = {EAGER: str(reason), COMPILED: str(reason)}
    else:

        def both_ways(w: Tensor, gradient: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            adjoint = gradient.addmv_(matrix.t(), residual) if adds else matrix.t() @ residual
            return matrix @ w, adjoint

        held = 4 * matrix.numel()
        fused = compiled(both_ways)
        peers = [
            Contender(EAGER, lambda: both_ways(w, for_peers, residual), holds=held),
            Contender(COMPILED, lambda: fused(w, for_peers, residual), holds=held, may_fail=True),
        ]
    compare(
        Case(
            operator="sketch" if kind == "sketch" else "project",
            what=f"{kind if kind == 'sketch' else f'project, {kind}'}, forward + {'accumulating ' * adds}adjoint",
            size=f"{quantity(weights)} weights, T={bits}",
            bytes_moved=(3 if adds else 2) * 4 * weights,
            ours=keyed_pair(kind, w, gradient, residual),
            floor=Contender(COPY, lambda: gradient.copy_(w)),
            peers=peers,
            left_out=left_out,
            axis=("weights", weights) if bits == 256 else None,
            **others,
        )
    )


def keyed_pair(kind: str, weights: Tensor, gradient: Tensor, residual: Tensor) -> Run:
    """Our pair with X drawn from a key."""
    count, total = weights.numel(), residual.numel()
    if weights.device.type == "cpu":
        w, g, out = weights.numpy(), residual.numpy(), gradient.numpy()
        return lambda: (ops.cpu.project(w, KEY, total, kind), ops.cpu.project_adjoint(g, KEY, count, kind, out=out))
    return lambda: (
        torch_ops.project(weights, KEY, total, kind),
        torch_ops.project_adjoint(residual, KEY, count, kind),
    )


def stored_signs(rows: int, weights: int, device: str) -> Tensor:
    """A float32 matrix [rows, weights] of random signs. ValueError where it is over 5 GB or half of the free memory.

    The first rows are repeated: what a matrix product costs does not depend on which finite values it reads.
    """
    size = 4 * rows * weights
    if size > min(LARGEST_MATRIX, free_memory(device) // 2):
        raise ValueError(f"the matrix would take {byte_size(size)}")
    fresh = torch.randint(0, 2, (min(rows, 8), weights), device=device, dtype=torch.int8) * 2 - 1
    matrix = torch.empty(rows, weights, device=device)
    for start in range(0, rows, len(fresh)):
        matrix[start : start + len(fresh)] = fresh[: rows - start]
    return matrix
