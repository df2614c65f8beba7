"""embedding_loss for torch tensors: the watermark regulariser over many layers, forward saving T residuals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from wmengine import _cpu
from wmengine.ops import torch_reference
from wmengine.ops.cpu import check_choice, check_key
from wmengine.ops.reference import CARRIERS, LINKS, PROJECTIONS, projection_scale
from wmengine.ops.torch_library import Tensor, check_tensor, cuda, define, signed, unsigned

_UNIT_CARRIERS = ("unit_filters", "unit_filter_mean")
_MEAN_CARRIERS = ("filter_mean", "unit_filter_mean")


def carrier_size(weights: Sequence[Tensor], carrier: str) -> int:
    """M: the values that the carrier reads from all the weights [filters, …]."""
    if carrier in _MEAN_CARRIERS:
        return sum(w.numel() // w.shape[0] if w.shape[0] else 0 for w in weights)
    return sum(w.numel() for w in weights)


def _norm_count(weights: Sequence[Tensor], carrier: str) -> int:
    return sum(w.shape[0] for w in weights) if carrier in _UNIT_CARRIERS else 0


def _tuples(
    weights: Sequence[Tensor], keys: Sequence[int], gradients: Sequence[Tensor] | None
) -> list[tuple[int, int, int, int, int]]:
    result = []
    for index, (weight, key) in enumerate(zip(weights, keys, strict=True)):
        filters = weight.shape[0]
        size = weight.numel() // filters if filters else 0
        target = 0 if gradients is None else gradients[index].data_ptr()
        result.append((weight.data_ptr(), target, filters, size, unsigned(key)))
    return result


def _embedding_loss_cpu(
    weights: Sequence[Tensor],
    keys: Sequence[int],
    bits: Tensor,
    carrier: str,
    projection: str,
    link: str,
    margin: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = [w.contiguous() for w in weights]
    if bits.dtype not in (torch.bool, torch.uint8) and bool(((bits != 0) & (bits != 1)).any()):
        raise ValueError("bits must hold 0 and 1 only")
    bits = bits.to(torch.uint8).contiguous()
    total = bits.numel()
    norms = torch.empty(_norm_count(weights, carrier), dtype=torch.float32)
    y, residual = torch.empty(total, dtype=torch.float32), torch.empty(total, dtype=torch.float32)
    _cpu.carrier_projection(
        _tuples(weights, keys, None),
        CARRIERS.index(carrier),
        PROJECTIONS.index(projection),
        total,
        scale,
        norms.data_ptr(),
        y.data_ptr(),
    )
    loss = _cpu.link_loss(y.data_ptr(), bits.data_ptr(), total, LINKS.index(link), margin, residual.data_ptr())
    return torch.tensor(loss, dtype=torch.float32), y, residual, norms


def _embedding_loss_cuda(
    weights: Sequence[Tensor],
    keys: Sequence[int],
    bits: Tensor,
    carrier: str,
    projection: str,
    link: str,
    margin: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plain = [unsigned(key) for key in keys]
    loss, y, residual, norms = cuda().embedding_loss_forward(
        list(weights), plain, bits, carrier, projection, link, margin, scale, bits.numel()
    )
    return loss, y, residual, norms


def _embedding_loss_fake(
    weights: Sequence[Tensor],
    keys: Sequence[int],
    bits: Tensor,
    carrier: str,
    projection: str,
    link: str,
    margin: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new = weights[0].new_empty
    total = bits.numel()
    return (
        new((), dtype=torch.float32),
        new(total, dtype=torch.float32),
        new(total, dtype=torch.float32),
        new(_norm_count(weights, carrier), dtype=torch.float32),
    )


define(
    "embedding_loss(Tensor[] weights, int[] keys, Tensor bits, str carrier, str projection, str link, float margin, "
    "float scale) -> (Tensor loss, Tensor y, Tensor residual, Tensor norms)",
    _embedding_loss_cpu,
    _embedding_loss_cuda,
    _embedding_loss_fake,
)


def _embedding_loss_backward_cpu(
    gradient: Tensor,
    weights: Sequence[Tensor],
    keys: Sequence[int],
    residual: Tensor,
    norms: Tensor,
    carrier: str,
    projection: str,
    scale: float,
) -> list[Tensor]:
    weights = [w.contiguous() for w in weights]
    residual = residual.contiguous()
    out = [torch.empty(w.shape, dtype=torch.float32) for w in weights]
    _cpu.embedding_backward(
        _tuples(weights, keys, out),
        CARRIERS.index(carrier),
        PROJECTIONS.index(projection),
        residual.numel(),
        scale * float(gradient),
        norms.data_ptr(),
        residual.data_ptr(),
    )
    return out


def _embedding_loss_backward_cuda(
    gradient: Tensor,
    weights: Sequence[Tensor],
    keys: Sequence[int],
    residual: Tensor,
    norms: Tensor,
    carrier: str,
    projection: str,
    scale: float,
) -> list[Tensor]:
    plain = [unsigned(key) for key in keys]
    result: list[Tensor] = cuda().embedding_loss_backward(
        gradient, list(weights), plain, residual, norms, carrier, projection, scale
    )
    return result


define(
    "embedding_loss_backward(Tensor gradient, Tensor[] weights, int[] keys, Tensor residual, Tensor norms, "
    "str carrier, str projection, float scale) -> Tensor[]",
    _embedding_loss_backward_cpu,
    _embedding_loss_backward_cuda,
    lambda gradient, weights, keys, residual, norms, carrier, projection, scale: [
        w.new_empty(w.shape) for w in weights
    ],
)


class _EmbeddingLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        keys: Sequence[int],
        bits: Tensor,
        carrier: str,
        projection: str,
        link: str,
        margin: float,
        scale: float,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        loss, y, residual, norms = torch.ops.wmengine.embedding_loss(
            weights, keys, bits, carrier, projection, link, margin, scale
        )
        ctx.save_for_backward(residual, norms, *weights)
        ctx.mark_non_differentiable(y)
        ctx.settings = (keys, carrier, projection, scale)
        return loss, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        residual, norms, *weights = ctx.saved_tensors
        keys, carrier, projection, scale = ctx.settings
        by_weight = torch.ops.wmengine.embedding_loss_backward(
            gradients[0], weights, keys, residual, norms, carrier, projection, scale
        )
        return (None, None, None, None, None, None, None, *by_weight)


def embedding_loss(
    weights: Sequence[Tensor],
    keys: Sequence[int],
    bits: Tensor,
    *,
    carrier: str,
    projection: str,
    link: str,
    margin: float = 1.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Watermark regulariser over many layers: carrier → projection → link against bits[T] → (loss, y[T]).

    `weights` are live tensors [filters, …], each with its own key; y = scale · Σ_l P(key_l) v_l. Carriers: ``flat``,
    ``unit_filters`` (each filter over its norm), ``filter_mean``, ``unit_filter_mean``. Projections: ``sketch``,
    ``rademacher``, ``gaussian``. Links, with s = 2b−1, summed over the bits: ``bce`` softplus(−s·y), ``hinge``
    relu(margin − s·y), ``mse`` (y − margin·s)², ``stdm`` softplus(−10·s·sin(10·y)). `scale` defaults to √(P/M) for a
    sketch and 1/√M for a dense projection, M the carrier's values in all. Differentiable by the weights; y is not.
    torch.func (vmap, grad) is not supported. Source: Uchida et al. 2017 (bce), Li, Tondi, Barni 2021 (stdm).
    """
    weights, keys = list(weights), list(keys)
    if not weights or len(weights) != len(keys):
        raise ValueError(f"embedding_loss needs one key for each weight: {len(weights)} weights, {len(keys)} keys")
    check_choice("carrier", carrier, CARRIERS)
    check_choice("projection", projection, PROJECTIONS)
    check_choice("link", link, LINKS)
    for index, weight in enumerate(weights):
        check_tensor(f"weights[{index}]", weight)
        if weight.ndim < 1:
            raise ValueError(f"weights[{index}] must have filters on its first axis, not be a scalar")
        if weight.device != weights[0].device:
            raise ValueError(
                f"weights[{index}] is on {weight.device}, weights[0] on {weights[0].device}: use one device"
            )
    if not isinstance(bits, torch.Tensor) or bits.ndim != 1 or bits.numel() < 1:
        raise ValueError("bits must be a tensor of one dimension with at least one bit")
    if bits.device != weights[0].device:
        raise ValueError(f"bits are on {bits.device}, the weights on {weights[0].device}: move the bits")
    if scale is None:
        scale = projection_scale(bits.numel(), carrier_size(weights, carrier), projection)
    unsigned = [check_key(key) for key in keys]
    if any(w.dtype == torch.float64 for w in weights):
        return torch_reference.embedding_loss(weights, unsigned, bits, carrier, projection, link, margin, scale)
    if weights[0].device.type == "cpu":
        weights = [w.float() for w in weights]
    loss, y = _EmbeddingLoss.apply(  # type: ignore[no-untyped-call]
        [signed(key) for key in unsigned], bits, carrier, projection, link, float(margin), float(scale), *weights
    )
    return loss, y
