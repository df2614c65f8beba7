"""soft_nearest_neighbor for torch tensors: the entanglement loss, which computes its gradients with itself.

Here the N × N squared distances are one product of centred features, n_i + n_j − 2 x_i·x_j; where that cancels, a pair
is computed again from the difference of the features as they were given, and so is its part of the gradient. That
serves a CPU, and float64 anywhere; on a GPU Triton works on slabs of the matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from wmengine.ops.cpu import check_choice
from wmengine.ops.torch_library import Tensor, check_length, check_tensor, define, is_integer, kernel, schema

DISTANCES = ("squared_euclidean", "cosine")
NEAR = 1.0 / 64  # of the sum of the norms: below, a distance has lost too many bits


def _positive(temperature: float) -> float:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and above 0, not {temperature}")
    return temperature


def _distances(x: Tensor, centered: Tensor, norms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(squared distances with infinity for i = j, which of them were computed from differences)."""
    sums = norms[:, None] + norms
    d = torch.addmm(sums, centered, centered.t(), alpha=-2).clamp_(min=0).fill_diagonal_(torch.inf)
    # where the norms are below the temperature, what cancels is nothing to the exponent
    near = d <= torch.where(sums > temperature, sums.mul_(NEAR), -1.0)
    if bool(near.any()):
        exact = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square_()
        d = torch.where(near, exact, d)
    return d, near


def _loss_and_gradients(
    features: Tensor, labels: Tensor, temperature: Tensor, by_features: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its gradients by the features, empty where not asked for, and by the temperature)."""
    t, largest = _positive(float(temperature)), torch.finfo(features.dtype).max
    inverse = min(1.0 / t, largest)
    x = features.contiguous()
    loss, gradient, by_temperature = (each.zero_() for each in _empty(x, labels, temperature, by_features))
    centered = x - x.mean(dim=0, dtype=torch.float64).to(x) if len(x) else x  # a sum of float32 might overflow
    norms = centered.square().sum(dim=1)
    if not bool((norms < largest / 8).all()):  # else every distance fits; NaN is not less
        return loss.fill_(math.nan), gradient.fill_(math.nan), by_temperature.fill_(math.nan)
    members = torch.unique(labels, return_counts=True)[1]
    counted = int(members[members > 1].sum())
    if not counted:
        return loss, gradient, by_temperature

    # Each of a row's two sums is taken relative to its nearest neighbour of that kind: neither underflows.
    same = labels[:, None] == labels
    d, near = _distances(x, centered, norms, t)
    nearest = [torch.where(kind, d, torch.inf).amin(dim=1) for kind in (same, ~same)]
    nearest = [torch.where(least < torch.inf, least, 0.0) for least in nearest]
    e = torch.where(same, nearest[0][:, None], nearest[1][:, None]).sub_(d).mul_(inverse).exp_()
    own = e * same
    own_sum, other_sum = own.sum(dim=1), (e - own).sum(dim=1)
    both = (own_sum > 0) & (other_sum > 0)
    own_sum, other_sum = (torch.where(both, sums.double(), 1.0) for sums in (own_sum, other_sum))
    ratio = (nearest[0].double() - nearest[1].double()) * inverse + other_sum.log() - own_sum.log()
    loss.copy_(torch.where(both, F.softplus(ratio, threshold=700), 0.0).sum() / counted)

    # weights: dloss/d(d_ij / T) by row i alone; a pair's two rows add up
    share = torch.where(both, torch.sigmoid(ratio), 0.0) / counted
    by_own, by_other = ((share / sums).to(x)[:, None] for sums in (own_sum, other_sum))
    weights = e.mul_(torch.where(same, by_own, -by_other))
    d.fill_diagonal_(0.0)
    by_temperature.copy_((weights * d).sum(dim=1, dtype=torch.float64).sum() * -inverse * inverse)
    if by_features:
        weights = weights + weights.t()
        for i in near.any(dim=1).nonzero().flatten().tolist():
            others = near[i].nonzero().flatten()
            gradient[i] = weights[i, others] @ (x[i] - x[others])
        weights = weights.masked_fill_(near, 0.0)
        gradient.addcmul_(weights.sum(dim=1, keepdim=True), centered).addmm_(weights, centered, alpha=-1)
        gradient.mul_(2.0 * inverse)
    return loss, gradient, by_temperature


def _empty(features: Tensor, labels: Tensor, temperature: Tensor, by_features: bool) -> tuple[Tensor, Tensor, Tensor]:
    new = features.new_empty
    return new(()), new(features.shape if by_features else 0), new(())


_on_gpu = kernel("soft_nearest_neighbor", "loss_and_gradients")

define(
    schema("soft_nearest_neighbor", _loss_and_gradients),
    _loss_and_gradients,
    lambda x, *rest: (_loss_and_gradients if x.dtype == torch.float64 else _on_gpu)(x, *rest),
    _empty,
)


class _SoftNearestNeighbor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, labels: Tensor, temperature: Tensor, by_features: bool) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):  # whose products would be of other types
            loss, *gradients = torch.ops.wmengine.soft_nearest_neighbor(features, labels, temperature, by_features)
        ctx.save_for_backward(*gradients)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        by_features, by_temperature = (
            gradients[0] * kept if ctx.needs_input_grad[place] else None
            for place, kept in zip((0, 2), ctx.saved_tensors, strict=True)
        )
        return by_features, None, by_temperature, None


def _temperature(value: object, features: Tensor) -> Tensor:
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    if isinstance(value, torch.Tensor):
        check_tensor("temperature", value)
        if value.numel() != 1 or value.device != features.device:
            raise ValueError(
                f"temperature must be one number on {features.device}, not shape {tuple(value.shape)} on {value.device}"
            )
        return value.reshape(()).to(dtype)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"temperature must be a number or a tensor, not {type(value).__name__}")
    return features.new_full((), _positive(value), dtype=dtype)


def soft_nearest_neighbor(
    features: Tensor, labels: Tensor, temperature: Tensor | float, *, distance: str = "squared_euclidean"
) -> Tensor:
    """Soft nearest neighbour loss of features[N, D] and labels int64[N] → a scalar, small where classes keep apart.

    The mean over i of −log(Σ_{j≠i, y_j=y_i} e^{−d_ij/T} / Σ_{j≠i} e^{−d_ij/T}) (Frosst, Papernot, Hinton 2019;
    entangled watermarks, Jia et al. 2021, maximise it). d is ‖x_i − x_j‖², or with ``cosine`` 1 − cos(x_i, x_j), where
    a row of zeros is ½ from every other row. Differentiable by the features and by the temperature T > 0, a number or
    a tensor of one; published code divides by T = 100/t, or takes 1/T, and learns t. There is no ε beside a sum: a
    row's two sums are shifted by its nearest neighbours, so neither is ever 0, and a learnt T may be as small as it
    likes. A row is left out of the mean, and stays a neighbour of others, where no other has its label; where that is
    true of all rows the loss is 0 and so are its gradients.

    Meant for batches: on a CPU a few N × N arrays are held while it is computed, on a GPU 2²² distances at a time.
    Raises TypeError or ValueError naming the argument; a temperature on a GPU that is not above 0 makes the loss NaN,
    as do features that are not finite or have a squared norm beyond float32. torch.func (vmap, grad) is not supported.
    """
    check_tensor("features", features, 2)
    check_choice("distance", distance, DISTANCES)
    check_length("labels", labels, len(features), features.device)
    if not is_integer(labels) and labels.dtype != torch.bool:
        raise TypeError(f"labels must be integers, not {labels.dtype}")
    scale = _temperature(temperature, features)
    wide = features if features.dtype == torch.float64 else features.float()
    if distance == "cosine":  # ‖u − v‖² = 2 (1 − cos) between unit vectors
        wide, scale = F.normalize(wide, dim=1), 2.0 * scale
    by_features = wide.requires_grad and torch.is_grad_enabled()
    return _SoftNearestNeighbor.apply(wide, labels.long(), scale, by_features)  # type: ignore[no-untyped-call, no-any-return]
