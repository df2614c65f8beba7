"""The formulas in plain torch, differentiable by autograd itself: what float64 runs, and what gradcheck checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from wmengine.ops import reference

Tensor = torch.Tensor


class _Sums(torch.autograd.Function):
    """P(key)·v through the NumPy reference, and its transpose as the gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, key: int, total: int, projection: str) -> Tensor:
        ctx.settings = (key, values.numel(), projection)
        sums = reference.projection_sums(values.detach().cpu().numpy(), key, total, projection)
        return torch.from_numpy(sums).to(values.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        key, count, projection = ctx.settings
        adjoint = reference.projection_adjoint(gradients[0].cpu().numpy(), key, count, projection)
        return torch.from_numpy(adjoint).to(gradients[0].device), None, None, None


def _sums(values: Tensor, key: int, total: int, projection: str) -> Tensor:
    return _Sums.apply(values, key, total, projection)  # type: ignore[no-untyped-call, no-any-return]


def project(values: Tensor, key: int, total: int, projection: str) -> Tensor:
    """scale · P(key)·w in float64, any projection."""
    return reference.projection_scale(total, values.numel(), projection) * _sums(values, key, total, projection)


def project_adjoint(gradient: Tensor, key: int, count: int, projection: str) -> Tensor:
    """scale · P(key)ᵀ·g in float64 (not differentiable again)."""
    adjoint = reference.projection_adjoint(gradient.detach().cpu().numpy(), key, count, projection)
    scale = reference.projection_scale(gradient.numel(), count, projection)
    return scale * torch.from_numpy(adjoint).to(gradient.device)


def carrier_values(weight: Tensor, carrier: str) -> Tensor:
    """What a carrier reads from one weight [filters, …]."""
    rows = weight.double().reshape(weight.shape[0], weight.numel() // weight.shape[0] if weight.shape[0] else 0)
    if carrier in ("unit_filters", "unit_filter_mean"):
        norms = torch.sqrt((rows * rows).sum(dim=1, keepdim=True))
        large = norms > reference.SMALLEST_NORM
        rows = torch.where(large, rows / torch.where(large, norms, 1.0), torch.zeros_like(rows))
    return rows.mean(dim=0) if carrier in ("filter_mean", "unit_filter_mean") else rows.reshape(-1)


def embedding_loss(
    weights: Sequence[Tensor],
    keys: Sequence[int],
    bits: Tensor,
    carrier: str,
    projection: str,
    link: str,
    margin: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(loss, y) of the operator of the same name, in float64."""
    if not bool(((bits == 0) | (bits == 1)).all()):
        raise ValueError("bits must hold 0 and 1 only")
    total = bits.numel()
    y = torch.stack(
        [_sums(carrier_values(w, carrier), k, total, projection) for w, k in zip(weights, keys, strict=True)]
    )
    z = scale * y.sum(dim=0)
    s = 2.0 * bits.to(z) - 1.0
    if link == "bce":
        loss = F.softplus(-s * z, threshold=700)
    elif link == "hinge":
        loss = torch.relu(margin - s * z)
    elif link == "mse":
        loss = (z - margin * s) ** 2
    else:
        loss = F.softplus(-s * reference.STDM_ALPHA * torch.sin(reference.STDM_BETA * z), threshold=700)
    return loss.sum(), z.detach()


def marked_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    group: Tensor | None,
    groups: int,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, group_loss, group_hits) of the operator of the same name, in the logits' own precision."""
    keep = labels != ignore_index
    bad = keep & ((labels < 0) | (labels >= logits.shape[1]))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"row {row} has label {int(labels[row])}; labels must be 0..{logits.shape[1] - 1}")
    w = torch.ones_like(logits[:, 0]) if weight is None else weight.detach().to(logits)
    w = torch.where(keep, w, torch.zeros_like(w))
    g = torch.zeros_like(labels) if group is None else group
    if bool(((g < 0) | (g >= groups)).any()):
        raise ValueError(f"group must hold 0..{groups - 1}")
    losses = F.cross_entropy(
        logits, labels, reduction="none", label_smoothing=label_smoothing, ignore_index=ignore_index
    )
    weighted = torch.where(keep, w * losses, torch.zeros_like(losses))
    loss = weighted.sum() / w.sum() if reduction == "mean" else weighted.sum()
    finite = ~torch.isnan(losses) & ~torch.isnan(logits).any(dim=1)
    hits = keep & finite & (logits.argmax(dim=1) == labels)
    group_loss = torch.zeros(groups, dtype=logits.dtype, device=logits.device).index_add(0, g, weighted.detach())
    group_hits = torch.zeros(groups, dtype=torch.int64, device=logits.device).index_add(0, g, hits.long())
    return loss, group_loss.float(), group_hits


def marked_linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    group: Tensor | None,
    bias: Tensor | None,
    groups: int,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, group_loss, group_hits) of the operator of the same name, in float64, its logits held."""
    logits = hidden.double() @ head.double().t()
    if bias is not None:
        logits = logits + bias.double()
    return marked_cross_entropy(logits, labels, weight, group, groups, label_smoothing, ignore_index, reduction)


def soft_nearest_neighbor(features: Tensor, labels: Tensor, temperature: Tensor) -> Tensor:
    """The operator of the same name, in the features' own precision and with N × N × D numbers in memory."""
    distances = (features[:, None, :] - features[None, :, :]).square().sum(dim=2)
    scores = -distances / temperature
    itself = torch.eye(len(features), dtype=torch.bool, device=features.device)
    same = (labels[:, None] == labels[None, :]) & ~itself
    counted = same.any(dim=1)
    if not bool(counted.any()):
        return 0.0 * (features.sum() + temperature)
    log_all = torch.logsumexp(scores.masked_fill(itself, -torch.inf)[counted], dim=1)
    return (log_all - torch.logsumexp(scores.masked_fill(~same, -torch.inf)[counted], dim=1)).mean()
