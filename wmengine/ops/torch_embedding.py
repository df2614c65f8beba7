"""embedding_loss for torch tensors: the watermark regulariser over many layers, forward saving T residuals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from wmengine import _cpu
from wmengine.ops import torch_reference
from wmengine.ops.cpu import check_choice
from wmengine.ops.reference import CARRIERS, LINKS, PROJECTIONS, projection_scale
from wmengine.ops.torch_library import Tensor, check_length, check_tensor, define, kernel, schema, signed, unsigned

_UNIT_CARRIERS = ("unit_filters", "unit_filter_mean")
_MEAN_CARRIERS = ("filter_mean", "unit_filter_mean")


def carrier_size(weights: Sequence[Tensor], carrier: str) -> int:
    """M: the values that the carrier reads from all the weights [filters, …]."""
    if carrier in _MEAN_CARRIERS:
        return sum(w.numel() // w.shape[0] if w.shape[0] else 0 for w in weights)
    return sum(w.numel() for w in weights)


def _has_channels_last(weight: Tensor, carrier: str) -> bool:
    """Whether an operator for CPUs reads the weight so as it is."""
    return (
        carrier == "unit_filters"
        and weight.ndim == 4
        and not weight.is_contiguous()
        and weight.is_contiguous(memory_format=torch.channels_last)
    )


def _in_order(weights: Sequence[Tensor], carrier: str) -> list[Tensor]:
    return [w if _has_channels_last(w, carrier) else w.contiguous() for w in weights]


def _gradients(weights: Sequence[Tensor], carrier: str) -> list[Tensor]:
    """Empty ones, laid out as `_in_order` lays out their weights."""
    return [torch.empty_like(w) if _has_channels_last(w, carrier) else w.new_empty(w.shape) for w in weights]


def _tuples(
    weights: Sequence[Tensor], keys: Sequence[int], carrier: str, gradients: Sequence[Tensor] | None = None
) -> list[tuple[int, int, int, int, int, int]]:
    """The weights, in order, as csrc/cpu/bindings.cpp takes them."""
    result = []
    for index, (weight, key) in enumerate(zip(weights, keys, strict=True)):
        filters = weight.shape[0]
        size = weight.numel() // filters if filters else 0
        target = 0 if gradients is None else gradients[index].data_ptr()
        channels = weight.shape[1] if _has_channels_last(weight, carrier) else 1
        result.append((weight.data_ptr(), target, filters, size, channels, unsigned(key)))
    return result


def _results(
    weights: Sequence[Tensor], bits: Tensor, keys: Sequence[int], carrier: str, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, y[T], dloss/dy[T], inverse norms of the filters where the carrier has them), still to be filled."""
    filters = sum(w.shape[0] for w in weights) if carrier in _UNIT_CARRIERS else 0
    loss, y, residual, norms = (
        weights[0].new_empty(shape, dtype=torch.float32) for shape in ((), bits.numel(), bits.numel(), filters)
    )
    return loss, y, residual, norms


def _on_cpu(
    weights: Sequence[Tensor],
    bits: Tensor,
    keys: Sequence[int],
    carrier: str,
    projection: str,
    scale: float,
    link: str,
    margin: float,
    signs: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = _in_order(weights, carrier)
    signs = None if signs is None else signs.contiguous()
    if bits.dtype not in (torch.bool, torch.uint8) and bool(((bits != 0) & (bits != 1)).any()):
        raise ValueError("bits must hold 0 and 1 only")
    bits = bits.to(torch.uint8).contiguous()
    loss, y, residual, norms = _results(weights, bits, keys, carrier)
    total = bits.numel()
    _cpu.carrier_projection(
        _tuples(weights, keys, carrier),
        CARRIERS.index(carrier),
        PROJECTIONS.index(projection),
        total,
        scale,
        0 if signs is None else signs.data_ptr(),
        norms.data_ptr(),
        y.data_ptr(),
    )
    loss.fill_(_cpu.link_loss(y.data_ptr(), bits.data_ptr(), total, LINKS.index(link), margin, residual.data_ptr()))
    return loss, y, residual, norms


define(schema("embedding_loss", _on_cpu), _on_cpu, kernel("embedding_loss", "forward"), _results)


def _backward_on_cpu(
    gradient: Tensor,
    weights: Sequence[Tensor],
    residual: Tensor,
    norms: Tensor,
    keys: Sequence[int],
    carrier: str,
    projection: str,
    scale: float,
) -> list[Tensor]:
    weights, residual = _in_order(weights, carrier), residual.contiguous()
    out = _gradients(weights, carrier)
    for gradient_of_weight in out:
        _cpu.use_large_pages(gradient_of_weight.data_ptr(), gradient_of_weight.nbytes)
    _cpu.embedding_backward(
        _tuples(weights, keys, carrier, out),
        CARRIERS.index(carrier),
        PROJECTIONS.index(projection),
        residual.numel(),
        scale * float(gradient),
        norms.data_ptr(),
        residual.data_ptr(),
    )
    return out


define(
    schema("embedding_loss_backward", _backward_on_cpu),
    _backward_on_cpu,
    kernel("embedding_loss", "backward"),
    lambda factor, weights, residual, norms, keys, carrier, *_: _gradients(weights, carrier if factor.is_cpu else ""),
)


class _EmbeddingLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        bits: Tensor,
        settings: tuple[Sequence[int], str, str, float, str, float, Tensor | None],
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        loss, y, residual, norms = torch.ops.wmengine.embedding_loss(weights, bits, *settings)
        ctx.save_for_backward(residual, norms, *weights)
        ctx.mark_non_differentiable(y)
        ctx.settings = settings[:4]
        return loss, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        residual, norms, *weights = ctx.saved_tensors
        by_weight = torch.ops.wmengine.embedding_loss_backward(gradients[0], weights, residual, norms, *ctx.settings)
        return (None, None, *by_weight)


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
    signs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Watermark regulariser over many layers: carrier → projection → link against bits[T] → (loss, y[T]).

    `weights` are live tensors [filters, …], each with its own key; y = scale · Σ_l P(key_l) v_l. Carriers: ``flat``,
    ``unit_filters`` (each filter over its norm), ``filter_mean``, ``unit_filter_mean``; the filters of unit carriers
    are taken times `signs`, float32 [filters of all weights], where these are given. Projections: ``sketch``,
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
    if signs is not None:
        if carrier not in _UNIT_CARRIERS:
            raise ValueError(f"signs go with unit filters, and the carrier is {carrier!r}")
        signs = check_length("signs", signs, sum(w.shape[0] for w in weights), weights[0].device).float()
    settings = ([signed(key) for key in keys], carrier, projection, float(scale), link, float(margin), signs)
    if any(w.dtype == torch.float64 for w in weights):
        return torch_reference.embedding_loss(weights, bits, *settings)
    if weights[0].device.type == "cpu":
        weights = [w.float() for w in weights]
    loss, y = _EmbeddingLoss.apply(bits, settings, *weights)  # type: ignore[no-untyped-call]
    return loss, y
