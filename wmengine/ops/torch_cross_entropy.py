"""marked_cross_entropy for torch tensors: task rows and trigger rows in one pass.

On a CPU the forward pass writes the gradient while each row of logits is in the cache, and keeps that. On a GPU it
keeps the normalizers of each row, top and Σ exp(z − top), and the backward pass reads the logits again; so it does for
float16 on a CPU, where a gradient that has not met the loss's scale yet would be rounded to zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from wmengine import _cpu
from wmengine.ops import torch_reference
from wmengine.ops.cpu import check_choice, check_count
from wmengine.ops.torch_library import Tensor, check_tensor, cuda, define, rows_of


class MarkedCrossEntropy(NamedTuple):
    """loss: scalar, differentiable; group_loss: float32[G], Σ wℓ of each group; group_hits: int64[G]."""

    loss: Tensor
    group_loss: Tensor
    group_hits: Tensor


_STORED = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/cpu/half.h


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _keeps_gradient(logits: Tensor) -> bool:
    """Whether the forward pass writes the gradient; else it keeps the normalizers of each row."""
    return logits.device.type == "cpu" and logits.dtype != torch.float16


def _run(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    group: Tensor | None,
    groups: int,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
    gradient: Tensor | None,
    normalizers: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, group_loss, group_hits, denominator) of logits from `rows_of`; gradient and normalizers where given."""
    labels, weight, group = labels.contiguous(), _contiguous(weight), _contiguous(group)
    loss = torch.empty((), dtype=torch.float32)
    group_loss = torch.empty(groups, dtype=torch.float32)
    group_hits = torch.empty(groups, dtype=torch.int64)
    denominator = torch.empty((), dtype=torch.float32)
    rows, classes = logits.shape
    _cpu.marked_cross_entropy(
        logits.data_ptr(),
        _STORED[logits.dtype],
        rows,
        classes,
        logits.stride(0),
        labels.data_ptr(),
        _address(weight),
        _address(group),
        groups,
        label_smoothing,
        ignore_index,
        mean,
        loss.data_ptr(),
        group_loss.data_ptr(),
        group_hits.data_ptr(),
        _address(normalizers),
        denominator.data_ptr(),
        _address(gradient),
        0 if gradient is None else gradient.stride(0),
    )
    return loss, group_loss, group_hits, denominator


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logits = rows_of(logits)
    gradient = normalizers = None
    if not _keeps_gradient(logits):
        kept = normalizers = torch.empty((logits.shape[0], 2), dtype=torch.float32)
    elif with_gradient:
        kept = gradient = torch.empty(logits.shape, dtype=logits.dtype)
    else:
        kept = torch.empty(0, dtype=logits.dtype)
    loss, group_loss, group_hits, denominator = _run(
        logits, labels, weight, group, groups, label_smoothing, ignore_index, mean, gradient, normalizers
    )
    return loss, group_loss, group_hits, kept, denominator


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    reduction = "mean" if mean else "sum"
    loss, group_loss, group_hits, normalizers, denominator = cuda().marked_cross_entropy_forward(
        logits, labels, weight, group, groups, label_smoothing, ignore_index, reduction
    )
    return loss, group_loss, group_hits, normalizers, denominator


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not _keeps_gradient(logits):
        kept = logits.new_empty((logits.shape[0], 2), dtype=torch.float32)
    else:
        kept = logits.new_empty(logits.shape if with_gradient else 0)
    return (
        logits.new_empty((), dtype=torch.float32),
        logits.new_empty(groups, dtype=torch.float32),
        logits.new_empty(groups, dtype=torch.int64),
        kept,
        logits.new_empty((), dtype=torch.float32),
    )


define(
    "marked_cross_entropy(Tensor logits, Tensor labels, Tensor? weight, Tensor? group, int groups, "
    "float label_smoothing, int ignore_index, bool mean, bool with_gradient) -> (Tensor loss, Tensor group_loss, "
    "Tensor group_hits, Tensor kept, Tensor denominator)",
    _cross_entropy_cpu,
    _cross_entropy_cuda,
    _cross_entropy_fake,
)


def _cross_entropy_backward_cpu(
    gradient: Tensor,
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    normalizers: Tensor,
    denominator: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    logits, labels, weight = rows_of(logits), labels.contiguous(), _contiguous(weight)
    rows, classes = logits.shape
    result = torch.empty((rows, classes), dtype=logits.dtype)
    _cpu.marked_cross_entropy_backward(
        logits.data_ptr(),
        _STORED[logits.dtype],
        rows,
        classes,
        logits.stride(0),
        labels.data_ptr(),
        _address(weight),
        label_smoothing,
        ignore_index,
        float(gradient / denominator),
        normalizers.data_ptr(),
        result.data_ptr(),
    )
    return result


def _cross_entropy_backward_cuda(
    gradient: Tensor,
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    normalizers: Tensor,
    denominator: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    result: Tensor = cuda().marked_cross_entropy_backward(
        gradient, logits, labels, weight, normalizers, denominator, label_smoothing, ignore_index
    )
    return result


define(
    "marked_cross_entropy_backward(Tensor gradient, Tensor logits, Tensor labels, Tensor? weight, Tensor normalizers, "
    "Tensor denominator, float label_smoothing, int ignore_index) -> Tensor",
    _cross_entropy_backward_cpu,
    _cross_entropy_backward_cuda,
    lambda gradient, logits, labels, weight, normalizers, denominator, label_smoothing, ignore_index: logits.new_empty(
        logits.shape
    ),
)


def _in_place_cpu(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    group: Tensor | None,
    groups: int,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, group_loss, group_hits, _ = _run(
        logits, labels, weight, group, groups, label_smoothing, ignore_index, False, logits, None
    )
    return loss, group_loss, group_hits


def _in_place_cuda(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    group: Tensor | None,
    groups: int,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = cuda().cross_entropy_in_place(
        logits, labels, weight, group, groups, label_smoothing, ignore_index
    )
    return result


define(
    "marked_cross_entropy_(Tensor(a!) logits, Tensor labels, Tensor? weight, Tensor? group, int groups, "
    "float label_smoothing, int ignore_index) -> (Tensor loss, Tensor group_loss, Tensor group_hits)",
    _in_place_cpu,
    _in_place_cuda,
    lambda logits, labels, weight, group, groups, label_smoothing, ignore_index: (
        logits.new_empty((), dtype=torch.float32),
        logits.new_empty(groups, dtype=torch.float32),
        logits.new_empty(groups, dtype=torch.int64),
    ),
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
        loss, group_loss, group_hits, kept, denominator = torch.ops.wmengine.marked_cross_entropy(
            logits, labels, weight, group, groups, label_smoothing, ignore_index, mean, with_gradient
        )
        ctx.mark_non_differentiable(group_loss, group_hits)
        ctx.set_materialize_grads(False)
        ctx.settings = (label_smoothing, ignore_index)
        if _keeps_gradient(logits):
            ctx.save_for_backward(kept)
        else:
            ctx.save_for_backward(kept, denominator, logits, labels, weight)
        return loss, group_loss, group_hits

    @staticmethod
    def backward(ctx: Any, outer: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        # What it costs to forbid a second differentiation is worth saving where none can follow.
        by_logits = _gradient_once(ctx, outer) if torch.is_grad_enabled() else _gradient(ctx, outer)
        return (by_logits, None, None, None, None, None, None, None, None)


def _gradient(ctx: Any, outer: Tensor) -> Tensor:
    kept, *others = ctx.saved_tensors
    if others:
        denominator, logits, labels, weight = others
        result: Tensor = torch.ops.wmengine.marked_cross_entropy_backward(
            outer, logits, labels, weight, kept, denominator, *ctx.settings
        )
        return result
    # The usual outer gradient is 1: then a whole pass over the array is saved (not while a graph is traced).
    gradient: Tensor = kept
    return gradient * outer if torch.compiler.is_compiling() or outer.item() != 1.0 else handed_over(gradient)


def handed_over(kept: Tensor) -> Tensor:
    """What forward kept, as a gradient that its receiver may change: a copy where the graph stays for another backward.

    Only autograd knows whether it stays, and tells nobody but torch's own compiler; without that answer the change of
    a gradient makes the next backward raise autograd's error of a saved tensor that was modified.
    """
    return kept.clone() if _graph_stays() else kept


_graph_stays = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: False)
_gradient_once = once_differentiable(_gradient)


def _integer(values: Tensor) -> bool:
    return not (values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool)


def check_length(name: str, value: Tensor | None, length: int, device: torch.device) -> None:
    """TypeError or ValueError unless `value` is None or a tensor that has the shape [length] and lies on `device`."""
    if value is not None and not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch tensor or None, not {type(value).__name__}")
    if value is not None and (value.shape != (length,) or value.device != device):
        raise ValueError(f"{name} must have shape ({length},) on {device}, not {tuple(value.shape)} on {value.device}")


def check_rows(
    rows: int,
    device: torch.device,
    labels: Tensor,
    weight: Tensor | None,
    group: Tensor | None,
    groups: int,
    label_smoothing: float,
    ignore_index: int,
) -> None:
    """TypeError or ValueError, naming the argument, unless they are what a cross entropy of so many rows takes."""
    check_count("groups", groups)
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"label_smoothing must be a number, not {type(label_smoothing).__name__}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1, not {label_smoothing}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, not {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must be a signed int of 64 bits, not {ignore_index}: use a label such as -100")
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels must be a torch tensor, not {type(labels).__name__}")
    for name, value in (("labels", labels), ("weight", weight), ("group", group)):
        check_length(name, value, rows, device)
    if not _integer(labels):
        raise TypeError(f"labels must be integer classes, not {labels.dtype}: soft labels cannot carry triggers")
    if group is not None and not _integer(group):
        raise TypeError(f"group must hold integers, not {group.dtype}")
    if weight is not None and (weight.dtype.is_complex or weight.dtype == torch.bool):
        raise TypeError(f"weight must hold real numbers, not {weight.dtype}")


def _check(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    group: Tensor | None,
    groups: int,
    label_smoothing: float,
    ignore_index: int,
) -> None:
    check_tensor("logits", logits, 2)
    if logits.shape[1] < 1:
        raise ValueError("logits must have at least one class")
    check_rows(logits.shape[0], logits.device, labels, weight, group, groups, label_smoothing, ignore_index)


def cross_entropy_in_place(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    group: Tensor | None,
    groups: int,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(Σ wℓ as a float32 scalar, group_loss float32[G], group_hits int64[G]); logits become the gradient of Σ wℓ.

    For buffers of the caller's own, as in a fused head: logits[N, C], float32, float16 or bfloat16, must not require a
    gradient, the classes of a row must lie side by side, and rows must not overlap. Arguments are those of
    :func:`marked_cross_entropy`. Nothing is overwritten where ValueError or TypeError is raised.
    """
    _check(logits, labels, weight, group, groups, label_smoothing, ignore_index)
    if logits.dtype == torch.float64:
        raise TypeError("logits must be float32, float16 or bfloat16 to be overwritten, not torch.float64")
    if logits.requires_grad:
        raise ValueError("logits must not require a gradient: they are overwritten")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"logits must have rows whose classes lie side by side, not strides {logits.stride()}")
    if logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError(
            f"logits must have rows that do not overlap, not shape {tuple(logits.shape)} with strides "
            f"{logits.stride()}: clone() them"
        )
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.wmengine.marked_cross_entropy_(
        logits,
        labels.long(),
        None if weight is None else weight.detach().float(),
        None if group is None else group.long(),
        groups,
        label_smoothing,
        ignore_index,
    )
    if not torch.compiler.is_compiling():  # which sees what the schema says is overwritten
        torch.autograd.graph.increment_version(logits)  # an operator of one's own does not
    return result


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
    0..C-1 or a group outside 0..G-1 raises ValueError on a CPU; on a GPU, which cannot raise without waiting, it makes
    the loss and the row's gradient NaN (a group only where the row is not ignored). torch.func (vmap, grad) is not
    supported.
    """
    check_choice("reduction", reduction, ("mean", "sum"))
    _check(logits, labels, weight, group, groups, label_smoothing, ignore_index)
    labels = labels.long()
    group = None if group is None else group.long()
    if logits.dtype == torch.float64:
        return MarkedCrossEntropy(
            *torch_reference.marked_cross_entropy(
                logits, labels, weight, group, groups, label_smoothing, ignore_index, reduction
            )
        )
    weight = None if weight is None else weight.detach().float()
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    return MarkedCrossEntropy(
        *_MarkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            logits, labels, weight, group, groups, label_smoothing, ignore_index, reduction == "mean", with_gradient
        )
    )
