"""sketch and project for torch tensors: each the gradient of its adjoint; a CPU reads them through NumPy, uncopied."""

from __future__ import annotations

from typing import Any

import torch

from wmengine.ops import cpu
from wmengine.ops.cpu import check_count
from wmengine.ops.reference import projection_scale
from wmengine.ops.torch_library import Tensor, check_tensor, define, kernel, schema, signed, unsigned


def _on_cpu(values: Tensor, key: int, size: int, projection: str, adjoint: bool) -> Tensor:
    run = cpu.project_adjoint if adjoint else cpu.project
    return torch.from_numpy(run(values.numpy(), unsigned(key), size, projection))


def _on_cuda(values: Tensor, key: int, size: int, projection: str, adjoint: bool) -> Tensor:
    if values.dtype == torch.float64:
        return _on_cpu(values.cpu(), key, size, projection, adjoint).to(values.device)
    count, total = (size, values.numel()) if adjoint else (values.numel(), size)
    scale = projection_scale(total, count, projection)
    front = kernel("embedding_loss", "project_adjoint" if adjoint else "project")
    return front(values, key, size, projection, scale)  # type: ignore[no-any-return]


define(schema("project", _on_cpu), _on_cpu, _on_cuda, lambda values, key, size, *_: values.new_empty(size))


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, key: int, size: int, projection: str, adjoint: bool) -> Tensor:
        ctx.back = (key, values.numel(), projection, not adjoint)
        return torch.ops.wmengine.project(values, key, size, projection, adjoint)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _Project.apply(gradients[0], *ctx.back), None, None, None, None  # type: ignore[no-untyped-call]


def _apply(values: Tensor, key: int, size: int, projection: str, adjoint: bool) -> Tensor:
    wide = values if values.dtype == torch.float64 else values.float()
    return _Project.apply(wide, signed(key), size, projection, adjoint)  # type: ignore[no-untyped-call, no-any-return]


def project(values: Tensor, key: int, total: int, projection: str) -> Tensor:
    """scale · P(key)·w of w[M] → [total], any projection; scaled as :func:`wmengine.ops.project` says."""
    check_tensor("values", values, 1)
    return _apply(values, key, check_count("total", total), projection, False)


def project_adjoint(gradient: Tensor, key: int, count: int, projection: str) -> Tensor:
    """The transpose of :func:`project`: g[total] → [count]."""
    check_count("the number of symbols in gradient", check_tensor("gradient", gradient, 1).numel())
    return _apply(gradient, key, check_count("count", count, least=0), projection, True)
