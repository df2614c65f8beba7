"""marked_linear_cross_entropy for torch tensors: the classifier head and its loss, a chunk of rows at a time.

A chunk's logits are made in one buffer, the cross entropy turns them into their own gradient there, and two products
carry that to the hidden states and to the head: logits[N, C] never exists. The gradients of Σ wℓ need nothing from
behind the loss but a factor, so forward makes them and backward multiplies (as Liger's FusedLinearCrossEntropy does,
Hsu et al. 2024, arXiv:2410.10989).

Rounding: losses and the sums of the gradients over chunks are float32 for every input. A GPU multiplies 16 bits as they
are into float32 logits and float32 sums; the gradient by the logits is rounded to 16 bits once (in float16 scaled, so
that small probabilities do not vanish). A CPU multiplies in float32, where products of 16 bits are up to a hundred
times slower without instructions for them; bfloat16 it multiplies as it is where it has those, and then, like torch,
rounds each product, the logits too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from wmengine.ops import torch_reference
from wmengine.ops.cpu import check_choice, check_count
from wmengine.ops.torch_cross_entropy import (
    MarkedCrossEntropy,
    check_length,
    check_rows,
    cross_entropy_in_place,
    handed_over,
)
from wmengine.ops.torch_library import Tensor, check_tensor, cuda, define

_LEAST_ROWS = 64
_LEAST_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 26}  # of a chunk, where the batch has so many
_LARGEST = 16384.0  # slope by a logit in float16, after scaling
_BFLOAT16_ON_CPU = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


def rows_of_a_chunk(
    rows: int, features: int, classes: int, device: str, chunk: int | None = None, stored: torch.dtype = torch.float32
) -> int:
    """Rows whose logits are held at once: `chunk`, or max(D, 64, L/C) with L = 2²² on a CPU and 2²⁶ on a GPU.

    With D rows the float32 logits take the memory of the head's gradient, which has to be held anyway, and the products
    do as much work for a byte of logits as for a byte of it; for logits of 16 bits that is at 2 D rows. The rows are
    then spread evenly over the chunks.
    """
    most = chunk or max(4 * features // stored.itemsize, _LEAST_ROWS, _LEAST_LOGITS[device] // classes)
    return max(1, -(-rows // max(1, -(-rows // most))))


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a·b, where `out` may be float32 for factors of 16 bits: a GPU rounds nothing on the way, a CPU each sum."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return out.copy_(a @ b) if a.device.type == "cpu" else torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out += a·b, in the precision of :func:`_product`."""
    if a.dtype == out.dtype:
        return out.addmm_(a, b)
    return out.add_(a @ b) if a.device.type == "cpu" else torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def _matrix(values: Tensor) -> Tensor:
    """What BLAS reads as it is, plain or transposed; other strides are copied here once and not in every chunk."""
    return values if 1 in values.stride() else values.contiguous()


def _waiting(dtype: torch.dtype) -> torch.dtype:
    """The type in which a gradient waits for backward: float16 would lose what a loss scaler is yet to lift."""
    return torch.float32 if dtype == torch.float16 else dtype


def _stored(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type of the logits when `dtype` is multiplied: a CPU has no product of 16 bits that is not rounded."""
    return dtype if device.type == "cpu" else torch.float32


def _check_rows(labels: Tensor, group: Tensor | None, classes: int, groups: int, kept: Tensor) -> None:
    """ValueError naming the first row, of the whole batch, whose label or group is out of range."""

    def outside(values: Tensor, count: int) -> Tensor:
        return (values < 0) | (values >= count)

    def bounded(values: Tensor | None, count: int) -> bool:
        if values is None or not values.numel():
            return True
        least, greatest = torch.aminmax(values)
        return int(least) >= 0 and int(greatest) < count

    if bounded(labels, classes) and bounded(group, groups):
        return
    bad = kept & outside(labels, classes)
    if group is not None:
        bad |= outside(group, groups)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"row {row} has label {int(labels[row])} and group {0 if group is None else int(group[row])}; labels must "
            f"be 0..{classes - 1} or ignore_index, groups 0..{groups - 1}"
        )


def _linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weight: Tensor | None,
    group: Tensor | None,
    groups: int,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
    chunk: int | None,
    dtype: torch.dtype,
    by_hidden: bool,
    by_head: bool,
    by_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    device = hidden.device
    (rows, features), classes = hidden.shape, head.shape[0]
    labels = labels.contiguous()
    weight = None if weight is None else weight.contiguous()
    group = None if group is None else group.contiguous()

    def floats(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=kind, device=device)

    grad_hidden = floats(*(hidden.shape if by_hidden else (0,)), kind=_waiting(hidden.dtype))
    kept = labels != ignore_index
    chosen = None  # the rows to work on, where these are not all
    if device.type == "cpu":
        _check_rows(labels, group, classes, groups, kept)
        if not bool(kept.all()):  # a GPU works on ignored rows as well: to count them it would have to be waited for
            chosen = kept.nonzero()[:, 0]
            rows = chosen.numel()
            grad_hidden.zero_()
    one = torch.ones((), dtype=torch.float32, device=device)
    denominator = (kept if weight is None else torch.where(kept, weight, 0.0)).sum(dtype=torch.float64)
    # A batch that is ignored altogether has the loss 0/0 and, as torch's, no gradient.
    factor = torch.where(kept.any(), 1.0 / denominator, 0.0).float() if mean else one
    scale = one
    if dtype == torch.float16 and rows:
        largest = one if weight is None else torch.where(kept, weight.abs(), 0.0).amax()
        scale = torch.where((largest > 0) & (largest < torch.inf), _LARGEST / largest, one)
    behind = factor / scale  # what the gradient of a chunk has to be multiplied by

    with_gradient, low, stored = by_hidden or by_head or by_bias, dtype != torch.float32, _stored(dtype, device)
    step = rows_of_a_chunk(rows, features, classes, device.type, chunk, stored)
    hidden, head_type, head = _matrix(hidden), head.dtype, _matrix(head).to(dtype)
    buffer = floats(step, classes, kind=stored)
    narrow = floats(step if stored != dtype and with_gradient else 0, classes, kind=dtype)
    slopes = floats(step if by_hidden else 0, features, kind=stored)
    alone = rows <= step and head_type == dtype == torch.bfloat16  # the sum over one chunk
    sums = floats(*(head.shape if by_head else (0,)), kind=dtype if alone else torch.float32)
    by_bias = by_bias and bias is not None
    bias_sums = floats(classes if by_bias else 0).zero_()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    group_loss = torch.zeros(groups, dtype=torch.float64, device=device)
    group_hits = torch.zeros(groups, dtype=torch.int64, device=device)
    for first in range(0, rows, step):
        size = min(step, rows - first)
        here = slice(first, first + size) if chosen is None else chosen[first : first + size]
        inputs = hidden[here].to(dtype)
        logits = _product(inputs, head.t(), buffer[:size])
        if bias is not None:
            logits += bias
        rest = (
            labels[here],
            None if weight is None else weight[here],
            None if group is None else group[here],
            groups,
            label_smoothing,
            ignore_index,
        )
        gradient = logits if stored == dtype else narrow[:size]
        if not with_gradient:
            totals = torch.ops.wmengine.marked_cross_entropy(logits, *rest, False, False)[:3]
        elif stored == dtype:
            totals = cross_entropy_in_place(logits, *rest)
        else:
            totals = cuda().cross_entropy_into(gradient, scale, logits, *rest)
        loss += totals[0]
        group_loss += totals[1]
        group_hits += totals[2]
        if by_bias:
            bias_sums += gradient.sum(dim=0, dtype=torch.float32)
        if by_hidden:
            grad_hidden[here] = _product(gradient, head, slopes[:size]).mul_(behind).to(grad_hidden.dtype)
        if by_head:
            # In float32 the factor goes into a few inputs; 16 bits would lose by it, and it waits for the end.
            add = _add_product if first else _product
            add(gradient.t(), inputs if low else inputs * factor, sums)
    if not rows:
        sums.zero_()
    elif low:
        sums = torch.mul(sums, behind, out=sums if alone else floats(*sums.shape, kind=_waiting(head_type)))
    return (
        (loss / denominator if mean else loss).float(),
        group_loss.float(),
        group_hits,
        grad_hidden,
        sums.to(_waiting(head_type)),
        (bias_sums * behind).to(_waiting(torch.float32 if bias is None else bias.dtype)),
    )


def _linear_cross_entropy_fake(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weight: Tensor | None,
    group: Tensor | None,
    groups: int,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
    chunk: int | None,
    dtype: torch.dtype,
    by_hidden: bool,
    by_head: bool,
    by_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def gradient(of: Tensor | None, wanted: bool) -> Tensor:
        kind = _waiting(torch.float32 if of is None else of.dtype)
        return hidden.new_empty(of.shape if wanted and of is not None else 0, dtype=kind)

    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(groups, dtype=torch.float32),
        hidden.new_empty(groups, dtype=torch.int64),
        gradient(hidden, by_hidden),
        gradient(head, by_head),
        gradient(bias, by_bias),
    )


define(
    "marked_linear_cross_entropy(Tensor hidden, Tensor head, Tensor? bias, Tensor labels, Tensor? weight, "
    "Tensor? group, int groups, float label_smoothing, int ignore_index, bool mean, int? chunk, ScalarType dtype, "
    "bool by_hidden, bool by_head, bool by_bias) -> (Tensor loss, Tensor group_loss, Tensor group_hits, "
    "Tensor grad_hidden, Tensor grad_head, Tensor grad_bias)",
    _linear_cross_entropy,
    _linear_cross_entropy,
    _linear_cross_entropy_fake,
)


class _MarkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        loss, group_loss, group_hits, *gradients = torch.ops.wmengine.marked_linear_cross_entropy(
            hidden, head, bias, *rest
        )
        ctx.mark_non_differentiable(group_loss, group_hits)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = (hidden.dtype, head.dtype, None if bias is None else bias.dtype)
        ctx.others = len(rest)
        return loss, group_loss, group_hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        outer = gradients[0]
        # The usual outer gradient is 1: then a pass over each array is saved (on a GPU, to look would be to wait).
        same = not torch.compiler.is_compiling() and outer.device.type == "cpu" and float(outer) == 1.0
        results: list[Tensor | None] = [None] * (3 + ctx.others)
        for place, (gradient, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
            if ctx.needs_input_grad[place]:
                results[place] = (handed_over(gradient) if same else gradient * outer).to(dtype)
        return tuple(results)


def marked_linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    group: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    groups: int = 1,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk: int | None = None,
) -> MarkedCrossEntropy:
    """:func:`marked_cross_entropy` of the logits hidden·headᵀ + bias, which are never held but for a chunk of rows.

    hidden[N, D], head[C, D], bias[C] or None; the rest as there. `loss` is differentiable once by hidden, head and
    bias, and each gradient has its tensor's dtype. `chunk` is the number of rows whose logits are held at once; by
    default max(D, 64, 2²²/C) on a CPU (2 D in bfloat16) and max(D, 64, 2²⁶/C) on a GPU, so that they take about the
    memory of the head. From forward to backward the gradients themselves are held. torch.func (vmap, grad) is not
    supported.

    The factors of the products have the wider type of hidden and head, under autocast autocast's; a CPU without
    instructions for bfloat16, and any CPU for float16, multiplies in float32. Sums over rows and losses are float32.
    """
    check_tensor("hidden", hidden, 2)
    check_tensor("head", head, 2)
    check_choice("reduction", reduction, ("mean", "sum"))
    if chunk is not None:
        check_count("chunk", chunk)
    (rows, features), classes = hidden.shape, head.shape[0]
    if classes < 1 or head.shape[1] != features or head.device != hidden.device:
        raise ValueError(
            f"head must have shape (classes, {features}) on {hidden.device}, with at least one class, "
            f"not {tuple(head.shape)} on {head.device}"
        )
    if bias is not None:
        check_tensor("bias", bias, 1)
        check_length("bias", bias, classes, hidden.device)
    check_rows(rows, hidden.device, labels, weight, group, groups, label_smoothing, ignore_index)
    labels = labels.long()
    group = None if group is None else group.long()
    dtype = torch.promote_types(hidden.dtype, head.dtype)
    if dtype == torch.float64:
        return MarkedCrossEntropy(
            *torch_reference.marked_linear_cross_entropy(
                hidden, head, labels, weight, group, bias, groups, label_smoothing, ignore_index, reduction
            )
        )
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if device == "cpu" and not (dtype == torch.bfloat16 and _BFLOAT16_ON_CPU):
        dtype = torch.float32
    weight = None if weight is None else weight.detach().float()
    by = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, head, bias)]
    settings = (groups, label_smoothing, ignore_index, reduction == "mean", chunk, dtype, *by)
    return MarkedCrossEntropy(
        *_MarkedLinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden, head, bias, labels, weight, group, *settings
        )
    )
