"""marked_cross_entropy for torch tensors: task rows and trigger rows in one pass.

The forward pass writes the gradient while each row of logits is in the cache, and keeps that. Of float16, where a
gradient that has not met the loss's scale yet would be rounded to zero, it keeps the normalizers of each row, top and
Σ exp(z − top), and the backward pass reads the logits again. So it does on a GPU in a graph, of torch.compile's, which
would multiply the gradient by the outer one in a pass of its own, or of CUDA's, which may be replayed backward twice.
Outside of one a kernel looks whether the outer gradient is 1, and nobody waits for the answer; where it is not, the
gradient is read and written once more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from wmengine import _cpu
from wmengine.ops import torch_reference
from wmengine.ops.cpu import check_choice, check_count
from wmengine.ops.torch_library import Tensor, check_length, check_tensor, define, is_integer, kernel, schema


class MarkedCrossEntropy(NamedTuple):
    """loss: scalar, differentiable; group_loss: float32[G], Σ wℓ of each group; group_hits: int64[G]."""

    loss: Tensor
    group_loss: Tensor
    group_hits: Tensor


_STORED = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/cpu/half.h


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _writes_gradient(logits: Tensor) -> bool:
    """Whether the forward pass is to write the gradient; else it keeps the normalizers of each row."""
    if not (logits.requires_grad and torch.is_grad_enabled()) or logits.dtype == torch.float16:
        return False
    return logits.is_cpu or not _in_a_graph(logits)


def _in_a_graph(tensor: Tensor) -> bool:
    """Whether a compiler or CUDA takes down what is done, to do it again."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _rows(
    logits: Tensor, labels: Tensor, weight: Tensor | None, group: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The arguments as the compiled operator takes them: the classes of a row side by side, the others contiguous."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rest = (None if each is None else each.contiguous() for each in (weight, group))
    return logits, labels.contiguous(), *rest  # type: ignore[return-value]


def _results(
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
    """(loss, group_loss, group_hits, what backward needs, denominator), still to be filled."""
    if with_gradient:
        kept = logits.new_empty(logits.shape)
    else:
        kept = logits.new_empty((logits.shape[0], 2), dtype=torch.float32)
    return (
        logits.new_empty((), dtype=torch.float32),
        logits.new_empty(groups, dtype=torch.float32),
        logits.new_empty(groups, dtype=torch.int64),
        kept,
        logits.new_empty((), dtype=torch.float32),
    )


def _on_cpu(
    logits: Tensor, labels: Tensor, weight: Tensor | None, group: Tensor | None, *settings: Any
) -> tuple[Tensor, ...]:
    logits, labels, weight, group = _rows(logits, labels, weight, group)
    results = _results(logits, labels, weight, group, *settings)
    loss, group_loss, group_hits, kept, denominator = results
    groups, label_smoothing, ignore_index, mean, with_gradient = settings
    _cpu.marked_cross_entropy(
        logits.data_ptr(),
        _STORED[logits.dtype],
        logits.shape[0],
        logits.shape[1],
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
        0 if with_gradient else kept.data_ptr(),
        denominator.data_ptr(),
        kept.data_ptr() if with_gradient else 0,
    )
    return results


define(schema("marked_cross_entropy", _results), _on_cpu, kernel("cross_entropy", "forward"), _results)
_scale_on_cuda = kernel("cross_entropy", "scale")


def _backward_on_cpu(
    gradient: Tensor,
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    normalizers: Tensor,
    denominator: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    logits, labels, weight, _ = _rows(logits, labels, weight)
    result = torch.empty(logits.shape, dtype=logits.dtype)
    _cpu.marked_cross_entropy_backward(
        logits.data_ptr(),
        _STORED[logits.dtype],
        logits.shape[0],
        logits.shape[1],
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


define(
    schema("marked_cross_entropy_backward", _backward_on_cpu),
    _backward_on_cpu,
    kernel("cross_entropy", "backward"),
    lambda gradient, logits, *_: logits.new_empty(logits.shape),
)


class _MarkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, weight: Tensor | None, group: Tensor | None, *settings: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, group_loss, group_hits, kept, denominator = torch.ops.wmengine.marked_cross_entropy(
            logits, labels, weight, group, *settings
        )
        ctx.mark_non_differentiable(group_loss, group_hits)
        ctx.set_materialize_grads(False)
        ctx.settings = settings[1:3]
        ctx.others = 3 + len(settings)
        if settings[-1]:
            ctx.save_for_backward(kept)
        else:
            ctx.save_for_backward(kept, denominator, logits, labels, weight)
        return loss, group_loss, group_hits

    @staticmethod
    def backward(ctx: Any, outer: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        # What it costs to forbid a second differentiation is worth saving where none can follow.
        by_logits = _gradient_once(ctx, outer) if torch.is_grad_enabled() else _gradient(ctx, outer)
        return (by_logits, *[None] * ctx.others)


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
    if _in_a_graph(gradient) or (gradient.is_cpu and outer.item() != 1.0):
        return gradient * outer
    gradient = _handed_over(gradient)
    if not gradient.is_cpu:
        _scale_on_cuda(gradient, outer)
    return gradient


def _handed_over(kept: Tensor) -> Tensor:
    """What forward kept, as a gradient that its receiver may change: a copy where the graph stays for another backward.

    Only autograd knows whether it stays, and tells nobody but torch's own compiler; without that answer the change of
    a gradient makes the next backward raise autograd's error of a saved tensor that was modified.
    """
    return kept.clone() if _graph_stays() else kept


_graph_stays = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: False)
_gradient_once = once_differentiable(_gradient)


def _check(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    group: Tensor | None,
    groups: int,
    label_smoothing: float,
    ignore_index: int,
) -> None:
    rows, classes = check_tensor("logits", logits, 2).shape
    if classes < 1:
        raise ValueError("logits must have at least one class")
    check_count("groups", groups)
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"label_smoothing must be a number, not {type(label_smoothing).__name__}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1, not {label_smoothing}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, not {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must be a signed int of 64 bits, not {ignore_index}: use a label such as -100")
    for name, value in (("labels", labels), ("weight", weight), ("group", group)):
        if value is not None or name == "labels":
            check_length(name, value, rows, logits.device)
    if not is_integer(labels):
        raise TypeError(f"labels must be integer classes, not {labels.dtype}: soft labels cannot carry triggers")
    if group is not None and not is_integer(group):
        raise TypeError(f"group must hold integers, not {group.dtype}")
    if weight is not None and (weight.dtype.is_complex or weight.dtype == torch.bool):
        raise TypeError(f"weight must hold real numbers, not {weight.dtype}")


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
    labels, group = labels.long(), None if group is None else group.long()
    settings = (groups, float(label_smoothing), ignore_index, reduction == "mean")
    if logits.dtype == torch.float64:
        return MarkedCrossEntropy(*torch_reference.marked_cross_entropy(logits, labels, weight, group, *settings))
    weight = None if weight is None else weight.detach().float()
    return MarkedCrossEntropy(
        *_MarkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            logits, labels, weight, group, *settings, _writes_gradient(logits)
        )
    )
