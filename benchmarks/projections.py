"""Both sides of the projection benchmarks: our keyed pair, forward and accumulating adjoint, and a stored matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.environment import free_memory
from benchmarks.harness import QUICK_REASON, Contender, Run, byte_size, compiled
from wmengine import ops
from wmengine.ops import torch_ops

EAGER = "stored matrix, eager torch"
COMPILED = "stored matrix, torch.compile"
LARGEST_MATRIX = 5_000_000_000
KEY = 0x1234_5678_9ABC_DEF0


def keyed_pair(kind: str, weights: Tensor, gradient: Tensor, residual: Tensor) -> Run:
    """y = X w and gradient += Xᵀ residual with X drawn from a key: `kind` is sketch, rademacher or gaussian."""
    count, total = weights.numel(), residual.numel()
    if weights.device.type == "cpu":
        w, g, out = weights.numpy(), residual.numpy(), gradient.numpy()

        def on_cpu() -> None:
            ops.cpu.project(w, KEY, total, kind)
            ops.cpu.project_adjoint(g, KEY, count, kind, out=out)

        return on_cpu

    def on_gpu() -> None:
        torch_ops.project(weights, KEY, total, kind)
        gradient.add_(torch_ops.project_adjoint(residual, KEY, count, kind))

    return on_gpu


def stored_signs(rows: int, weights: int, device: str) -> Tensor:
    """A float32 matrix [rows, weights] of random signs. ValueError where it is over 5 GB or half of the free memory.

    The first rows are repeated: what a matrix product costs does not depend on which finite values it reads.
    """
    size = 4 * rows * weights
    if size > min(LARGEST_MATRIX, free_memory(device) // 2):
        raise ValueError(f"the matrix would take {byte_size(size)}")
    matrix = torch.empty(rows, weights, device=device)
    fresh = min(rows, 8)
    matrix[:fresh] = torch.randint(0, 2, (fresh, weights), device=device, dtype=torch.int8) * 2 - 1
    for start in range(fresh, rows, fresh):
        matrix[start : start + fresh] = matrix[: min(fresh, rows - start)]
    return matrix


def stored_pair(
    weights: Tensor, gradient: Tensor, residual: Tensor, quick: bool
) -> tuple[list[Contender], dict[str, str]]:
    """Peers that do y = X w and gradient += Xᵀ residual with X in memory, or why there are none."""
    try:
        matrix = stored_signs(residual.numel(), weights.numel(), str(weights.device))
    except ValueError as reason:
        return [], {EAGER: str(reason), COMPILED: str(reason)}

    def both_ways(weights: Tensor, gradient: Tensor, residual: Tensor) -> Tensor:
        y = matrix @ weights
        gradient.addmv_(matrix.t(), residual)
        return y

    size = 4 * matrix.numel()
    peers = [Contender(EAGER, lambda: both_ways(weights, gradient, residual), holds=size)]
    if quick:
        return peers, {COMPILED: QUICK_REASON}
    faster = compiled(both_ways)
    peers.append(Contender(COMPILED, lambda: faster(weights, gradient, residual), holds=size, may_fail=True))
    return peers, {}
