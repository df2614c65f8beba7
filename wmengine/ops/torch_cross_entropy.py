"""marked_cross_entropy for torch tensors: task rows and trigger rows in one pass.

On a CPU the forward pass writes the gradient while each row of logits is in the cache (`gradient`); on a GPU it keeps
the log-sum-exp of each row and the denominator (`lse`, `denominator`), and the backward pass reads the logits again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from wmengine import _cpu
from wmengine.ops import torch_reference
from wmengine.ops.cpu import check_choice, check_count
from wmengine.ops.torch_library import LIBRARY, Tensor, check_tensor, cuda, define


class MarkedCrossEntropy(NamedTuple):
    """loss: scalar, differentiable; group_loss: float32[G], Σ wℓ of each group; group_hits: int64[G]."""

    loss: Tensor
    group_loss: Tensor
    group_hits: Tensor


def _cross_entropy_cpu(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    group: Tensor | None,
    groups: int,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, classes = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    labels = labels.contiguous()
    weight = None if weight is None else weight.contiguous()
    group = None if group is None else group.contiguous()
    gradient = torch.empty((rows, classes) if with_gradient else 0, dtype=torch.float32)
    group_loss = torch.empty(groups, dtype=torch.float32)
    group_hits = torch.empty(groups, dtype=torch.int64)
    loss = _cpu.marked_cross_entropy(
        logits.data_ptr(),
        rows,
        classes,
        logits.stride(0),
        labels.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if group is None else group.data_ptr(),
        groups,
        label_smoothing,
        ignore_index,
        mean,
        group_loss.data_ptr(),
        group_hits.data_ptr(),
        gradient.data_ptr() if with_gradient else 0,
    )
    none = torch.empty(0, dtype=torch.float32)
    return torch.tensor(loss, dtype=torch.float32), group_loss, group_hits, gradient, none, none.clone()


def _cross_entropy_cuda(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    group: Tensor | None,
    groups: int,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    reduction = "mean" if mean else "sum"
    loss, group_loss, group_hits, lse, denominator = cuda().marked_cross_entropy_forward(
        logits, labels, weight, group, groups, label_smoothing, ignore_index, reduction
    )
    return loss, group_loss, group_hits, logits.new_empty(0, dtype=torch.float32), lse, denominator


def _cross_entropy_fake(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    group: Tensor | None,
    groups: int,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    on_gpu = logits.device.type == "cuda"
    return (
        logits.new_empty((), dtype=torch.float32),
        logits.new_empty(groups, dtype=torch.float32),
        logits.new_empty(groups, dtype=torch.int64),
        logits.new_empty(0 if on_gpu or not with_gradient else logits.shape, dtype=torch.float32),
        logits.new_empty(logits.shape[0] if on_gpu else 0, dtype=torch.float32),
        logits.new_empty(() if on_gpu else 0, dtype=torch.float32),
    )


define(
    "marked_cross_entropy(Tensor logits, Tensor labels, Tensor? weight, Tensor? group, int groups, "
    "float label_smoothing, int ignore_index, bool mean, bool with_gradient) -> (Tensor loss, Tensor group_loss, "
    "Tensor group_hits, Tensor gradient, Tensor lse, Tensor denominator)",
    _cross_entropy_cpu,
    _cross_entropy_cuda,
    _cross_entropy_fake,
)


def _cross_entropy_backward_cuda(
    gradient: Tensor,
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    denominator: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    result: Tensor = cuda().marked_cross_entropy_backward(
        gradient, logits, labels, weight, lse, denominator, label_smoothing, ignore_index
    )
    return result


LIBRARY.define(
    "marked_cross_entropy_backward(Tensor gradient, Tensor logits, Tensor labels, Tensor? weight, Tensor lse, "
    "Tensor denominator, float label_smoothing, int ignore_index) -> Tensor"
)
LIBRARY.impl("marked_cross_entropy_backward", _cross_entropy_backward_cuda, "CUDA")
torch.library.register_fake(
    "wmengine::marked_cross_entropy_backward",
    lambda gradient, logits, labels, weight, lse, denominator, label_smoothing, ignore_index: logits.new_empty(
        logits.shape
    ),
    lib=LIBRARY,
)


class _MarkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        weight: Tensor | None,
        group: Tensor | None,
        groups: int,
        label_smoothing: float,
        ignore_index: int,
        mean: bool,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, group_loss, group_hits, gradient, lse, denominator = torch.ops.wmengine.marked_cross_entropy(
            logits, labels, weight, group, groups, label_smoothing, ignore_index, mean, with_gradient
        )
        ctx.mark_non_differentiable(group_loss, group_hits)
        ctx.settings = (label_smoothing, ignore_index)
        if logits.device.type == "cuda":
            ctx.save_for_backward(logits, labels, weight, lse, denominator)
        else:
            ctx.save_for_backward(gradient)
        return loss, group_loss, group_hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        outer = gradients[0]
        if len(ctx.saved_tensors) > 1:
            logits, labels, weight, lse, denominator = ctx.saved_tensors
            by_logits = torch.ops.wmengine.marked_cross_entropy_backward(
                outer, logits, labels, weight, lse, denominator, *ctx.settings
            )
        else:
            (by_logits,) = ctx.saved_tensors
            # The usual outer gradient is 1: then a whole pass over the array is saved (not while a graph is traced).
            if torch.compiler.is_compiling() or float(outer) != 1.0:
                by_logits = by_logits * outer
        return (by_logits, None, None, None, None, None, None, None, None)


def marked_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    group: Tensor | None = None,
    *,
    groups: int = 1,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> MarkedCrossEntropy:
    """Cross entropy of task rows and trigger rows in one pass → (loss, group_loss[G], group_hits[G]).

    logits[N, C], labels int64[N], weight[N] or None for 1, group int64[N] or None for 0. ``mean`` divides Σ wℓ by Σ w
    of the rows not ignored, ``sum`` does not. group_loss holds Σ wℓ and group_hits the rows whose argmax is their
    label, by group; only `loss` is differentiable. A NaN row makes the loss NaN and is never a hit. A label outside
    0..C-1 raises ValueError on a CPU; on a GPU, which cannot raise without waiting, it makes the loss NaN.
    """
    check_tensor("logits", logits, 2)
    check_count("groups", groups)
    check_choice("reduction", reduction, ("mean", "sum"))
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1, not {label_smoothing}")
    rows, classes = logits.shape
    if classes < 1:
        raise ValueError("logits must have at least one class")
    for name, value in (("labels", labels), ("weight", weight), ("group", group)):
        if value is not None and (value.shape != (rows,) or value.device != logits.device):
            raise ValueError(
                f"{name} must have shape ({rows},) on {logits.device}, not {tuple(value.shape)} on {value.device}"
            )
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integer classes, not {labels.dtype}: soft labels cannot carry triggers")
    labels = labels.long()
    group = None if group is None else group.long()
    if logits.dtype == torch.float64:
        return MarkedCrossEntropy(
            *torch_reference.marked_cross_entropy(
                logits, labels, weight, group, groups, label_smoothing, ignore_index, reduction
            )
        )
    weight = None if weight is None else weight.detach().float()
    if logits.device.type == "cpu":
        logits = logits.float()
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    return MarkedCrossEntropy(
        *_MarkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            logits, labels, weight, group, groups, label_smoothing, ignore_index, reduction == "mean", with_gradient
        )
    )
