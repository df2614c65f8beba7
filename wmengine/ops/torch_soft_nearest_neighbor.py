"""soft_nearest_neighbor for torch tensors: the entanglement loss without its matrix of distances.

The forward pass keeps four numbers a row (`nearest`), the backward pass computes the distances again, tile by tile.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from wmengine import _cpu
from wmengine.ops import torch_reference
from wmengine.ops.cpu import check_choice
from wmengine.ops.torch_library import Tensor, check_tensor, define, rows_of

DISTANCES = ("squared_euclidean", "cosine")


def _positive(temperature: float) -> float:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and above 0, not {temperature}")
    return temperature


def _forward_cpu(features: Tensor, labels: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    rows, size = features.shape
    features, labels = rows_of(features), labels.contiguous()
    nearest = torch.empty((4, rows), dtype=torch.float32)
    loss = _cpu.soft_nearest_neighbor(
        features.data_ptr(),
        rows,
        size,
        features.stride(0),
        labels.data_ptr(),
        _positive(float(temperature)),
        nearest.data_ptr(),
    )
    return torch.tensor(loss, dtype=torch.float32), nearest


def _forward_cuda(features: Tensor, labels: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    from wmengine.kernels import soft_nearest_neighbor as kernels

    with torch.cuda.device(features.device):
        return kernels.forward(features, labels, temperature)


define(
    "soft_nearest_neighbor(Tensor features, Tensor labels, Tensor temperature) -> (Tensor loss, Tensor nearest)",
    _forward_cpu,
    _forward_cuda,
    lambda features, labels, temperature: (
        features.new_empty((), dtype=torch.float32),
        features.new_empty((4, features.shape[0]), dtype=torch.float32),
    ),
)


def _backward_cpu(
    gradient: Tensor, features: Tensor, labels: Tensor, temperature: Tensor, nearest: Tensor, by_features: bool
) -> tuple[Tensor, Tensor]:
    rows, size = features.shape
    features, labels, nearest = rows_of(features), labels.contiguous(), nearest.contiguous()
    result = torch.empty((rows, size) if by_features else 0, dtype=torch.float32)
    by_temperature = _cpu.soft_nearest_neighbor_backward(
        features.data_ptr(),
        rows,
        size,
        features.stride(0),
        labels.data_ptr(),
        float(temperature),
        nearest.data_ptr(),
        float(gradient),
        result.data_ptr() if by_features else 0,
    )
    return result, torch.tensor(by_temperature, dtype=torch.float32)


def _backward_cuda(
    gradient: Tensor, features: Tensor, labels: Tensor, temperature: Tensor, nearest: Tensor, by_features: bool
) -> tuple[Tensor, Tensor]:
    from wmengine.kernels import soft_nearest_neighbor as kernels

    with torch.cuda.device(features.device):
        return kernels.backward(gradient, features, labels, temperature, nearest, by_features)


define(
    "soft_nearest_neighbor_backward(Tensor gradient, Tensor features, Tensor labels, Tensor temperature, "
    "Tensor nearest, bool by_features) -> (Tensor features_gradient, Tensor temperature_gradient)",
    _backward_cpu,
    _backward_cuda,
    lambda gradient, features, labels, temperature, nearest, by_features: (
        features.new_empty(features.shape if by_features else 0, dtype=torch.float32),
        features.new_empty((), dtype=torch.float32),
    ),
)


class _SoftNearestNeighbor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, labels: Tensor, temperature: Tensor) -> Tensor:
        loss, nearest = torch.ops.wmengine.soft_nearest_neighbor(features, labels, temperature)
        ctx.save_for_backward(features, labels, temperature, nearest)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        by_features, by_temperature = torch.ops.wmengine.soft_nearest_neighbor_backward(
            gradients[0], *ctx.saved_tensors, ctx.needs_input_grad[0]
        )
        return (
            by_features if ctx.needs_input_grad[0] else None,
            None,
            by_temperature if ctx.needs_input_grad[2] else None,
        )


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

    Needs memory for three copies of the features and a few numbers a row and 96 rows, never N × N; float64 features
    take N × N × D, being meant for checks. Raises TypeError or ValueError naming the argument; a temperature on a GPU
    that is not above 0 makes the loss NaN, as do features that are not finite or have a squared norm beyond float32.
    torch.func (vmap, grad) is not supported.
    """
    check_tensor("features", features, 2)
    check_choice("distance", distance, DISTANCES)
    rows = features.shape[0]
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels must be a torch tensor, not {type(labels).__name__}")
    if labels.shape != (rows,) or labels.device != features.device:
        raise ValueError(
            f"labels must have shape ({rows},) on {features.device}, not {tuple(labels.shape)} on {labels.device}"
        )
    if labels.dtype.is_floating_point or labels.dtype.is_complex:
        raise TypeError(f"labels must be integers, not {labels.dtype}")
    scale = _temperature(temperature, features)
    labels = labels.long()
    wide = features if features.dtype == torch.float64 else features.float()
    if distance == "cosine":  # ‖u − v‖² = 2 (1 − cos) between unit vectors
        wide, scale = F.normalize(wide, dim=1), 2.0 * scale
    if wide.dtype == torch.float64:
        return torch_reference.soft_nearest_neighbor(wide, labels, scale)
    return _SoftNearestNeighbor.apply(wide, labels, scale)  # type: ignore[no-untyped-call, no-any-return]
