"""The formulas in plain torch, differentiable by autograd itself: what float64 runs, and what gradcheck checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from wmengine.ops import reference
from wmengine.ops.torch_library import Tensor, unsigned
from wmengine.ops.torch_projection import project


def carrier_values(weight: Tensor, carrier: str, signs: Tensor | None) -> Tensor:
    """What a carrier reads from one weight [filters, …]."""
    rows = weight.double().reshape(weight.shape[0], weight.numel() // weight.shape[0] if weight.shape[0] else 0)
    if carrier in ("unit_filters", "unit_filter_mean"):
        large = torch.linalg.vector_norm(rows.detach(), dim=1, keepdim=True) > reference.SMALLEST_NORM
        # A norm of 0 has no derivative, not even one that is masked.
        norms = torch.sqrt(torch.where(large, rows * rows, 1.0).sum(dim=1, keepdim=True))
        rows = torch.where(large, rows / norms, torch.zeros_like(rows))
        rows = rows if signs is None else rows * signs[:, None]
    return rows.mean(dim=0) if carrier in ("filter_mean", "unit_filter_mean") else rows.reshape(-1)


def embedding_loss(
    weights: Sequence[Tensor],
    bits: Tensor,
    keys: Sequence[int],
    carrier: str,
    projection: str,
    scale: float,
    link: str,
    margin: float,
    signs: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(loss, y) of the operator of the same name, in float64."""
    if not bool(((bits == 0) | (bits == 1)).all()):
        raise ValueError("bits must hold 0 and 1 only")
    total, sums = bits.numel(), []
    of_weights = [None] * len(weights) if signs is None else torch.split(signs, [len(w) for w in weights])
    for weight, key, of_filters in zip(weights, keys, of_weights, strict=True):
        values = carrier_values(weight, carrier, of_filters)
        own = reference.projection_scale(total, values.numel(), projection) or 1.0  # of no values, whose sums are 0
        sums.append(project(values, unsigned(key), total, projection) / own)
    z = scale * torch.stack(sums).sum(dim=0)
    return link_loss(z, bits, link, margin), z.detach()


def link_loss(z: Tensor, bits: Tensor, link: str, margin: float) -> Tensor:
    """Loss of y [T] against bits [T], summed over them; differentiable."""
    s = 2.0 * bits.to(z) - 1.0
    if link == "bce":
        loss = F.softplus(-s * z, threshold=700)
    elif link == "hinge":
        loss = torch.relu(margin - s * z)
    elif link == "mse":
        loss = (z - margin * s) ** 2
    else:
        loss = F.softplus(-s * reference.STDM_ALPHA * torch.sin(reference.STDM_BETA * z), threshold=700)
    return loss.sum()


def marked_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    group: Tensor | None,
    groups: int,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
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
    loss = weighted.sum() / w.sum() if mean else weighted.sum()
    finite = ~torch.isnan(losses) & ~torch.isnan(logits).any(dim=1)
    hits = keep & finite & (logits.argmax(dim=1) == labels)
    group_loss = torch.zeros(groups, dtype=logits.dtype, device=logits.device).index_add(0, g, weighted.detach())
    group_hits = torch.zeros(groups, dtype=torch.int64, device=logits.device).index_add(0, g, hits.long())
    return loss, group_loss.float(), group_hits
