"""sketch and project for torch tensors: each the other's gradient, with its adjoint."""

from __future__ import annotations

from typing import Any

import torch

from wmengine import _cpu
from wmengine.ops import torch_reference
from wmengine.ops.cpu import check_choice, check_count, check_key
from wmengine.ops.reference import CARRIERS, PROJECTIONS, projection_scale
from wmengine.ops.torch_library import Tensor, check_tensor, cuda, define, signed, unsigned


def _project_cpu(values: Tensor, key: int, total: int, projection: str) -> Tensor:
    values = values.contiguous()
    y = torch.empty(total, dtype=torch.float32)
    _cpu.carrier_projection(
        [(values.data_ptr(), 0, 1, values.numel(), unsigned(key))],
        CARRIERS.index("flat"),
        PROJECTIONS.index(projection),
        total,
        projection_scale(total, values.numel(), projection),
        0,
        y.data_ptr(),
    )
    return y


def _project_adjoint_cpu(gradient: Tensor, key: int, count: int, projection: str) -> Tensor:
    gradient = gradient.contiguous()
    out = torch.empty(count, dtype=torch.float32)
    _cpu.projection_adjoint(
        gradient.data_ptr(),
        gradient.numel(),
        count,
        unsigned(key),
        PROJECTIONS.index(projection),
        projection_scale(gradient.numel(), count, projection),
        False,
        out.data_ptr(),
    )
    return out


def _project_cuda(values: Tensor, key: int, total: int, projection: str) -> Tensor:
    scale = projection_scale(total, values.numel(), projection)
    result: Tensor = cuda().project(values, unsigned(key), total, projection, scale)
    return result


def _project_adjoint_cuda(gradient: Tensor, key: int, count: int, projection: str) -> Tensor:
    scale = projection_scale(gradient.numel(), count, projection)
    result: Tensor = cuda().project_adjoint(gradient, unsigned(key), count, projection, scale)
    return result


define(
    "project(Tensor values, int key, int total, str projection) -> Tensor",
    _project_cpu,
    _project_cuda,
    lambda values, key, total, projection: values.new_empty(total, dtype=torch.float32),
)
define(
    "project_adjoint(Tensor gradient, int key, int count, str projection) -> Tensor",
    _project_adjoint_cpu,
    _project_adjoint_cuda,
    lambda gradient, key, count, projection: gradient.new_empty(count, dtype=torch.float32),
)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, key: int, total: int, projection: str) -> Tensor:
        ctx.key, ctx.count, ctx.projection = key, values.numel(), projection
        return torch.ops.wmengine.project(values, key, total, projection)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _ProjectAdjoint.apply(gradients[0], ctx.key, ctx.count, ctx.projection), None, None, None  # type: ignore[no-untyped-call]


class _ProjectAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, key: int, count: int, projection: str) -> Tensor:
        ctx.key, ctx.total, ctx.projection = key, gradient.numel(), projection
        return torch.ops.wmengine.project_adjoint(gradient, key, count, projection)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _Project.apply(gradients[0], ctx.key, ctx.total, ctx.projection), None, None, None  # type: ignore[no-untyped-call]


def _project(values: Tensor, key: int, total: int, projection: str) -> Tensor:
    values, total = check_tensor("values", values, 1), check_count("total", total)
    if values.dtype == torch.float64:
        return torch_reference.project(values, check_key(key), total, projection)
    return _Project.apply(values.float(), signed(key), total, projection)  # type: ignore[no-untyped-call, no-any-return]


def _project_adjoint(gradient: Tensor, key: int, count: int, projection: str) -> Tensor:
    gradient = check_tensor("gradient", gradient, 1)
    check_count("the number of symbols in gradient", gradient.numel())
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"count must be an int of at least 0, not {count!r}")
    if gradient.dtype == torch.float64:
        return torch_reference.project_adjoint(gradient, check_key(key), count, projection)
    return _ProjectAdjoint.apply(gradient.float(), signed(key), count, projection)  # type: ignore[no-untyped-call, no-any-return]


def sketch(values: Tensor, key: int, total: int) -> Tensor:
    """See :func:`wmengine.ops.sketch`."""
    return _project(values, key, total, "sketch")


def sketch_adjoint(gradient: Tensor, key: int, count: int) -> Tensor:
    """See :func:`wmengine.ops.sketch_adjoint`."""
    return _project_adjoint(gradient, key, count, "sketch")


def project(values: Tensor, key: int, total: int, kind: str = "rademacher") -> Tensor:
    """See :func:`wmengine.ops.project`."""
    return _project(values, key, total, check_choice("kind", kind, PROJECTIONS[1:]))


def project_adjoint(gradient: Tensor, key: int, count: int, kind: str = "rademacher") -> Tensor:
    """See :func:`wmengine.ops.project_adjoint`."""
    return _project_adjoint(gradient, key, count, check_choice("kind", kind, PROJECTIONS[1:]))
