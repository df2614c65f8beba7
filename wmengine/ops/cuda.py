"""The operators for CUDA tensors: `_cuda` (CUDA C++) for projections and counts, Triton for the training losses.

Every call queues its work on the current stream of the tensor's device and returns without waiting for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import ModuleType

import torch

from wmengine._optional import require
from wmengine.ops.cpu import check_matching
from wmengine.ops.matches import PackedBits, check_labels
from wmengine.ops.reference import MOST_LEVEL, MatchCounts, padded_buckets
from wmengine.ops.torch_library import rows_of

Tensor = torch.Tensor

_KINDS = {"rademacher": 0, "gaussian": 1}
_SCALARS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_INTEGERS = {torch.int32: 0, torch.int64: 1}


def _compiled() -> ModuleType:
    """The compiled module, or an ImportError that says how to get it."""
    try:
        from wmengine import _cuda
    except ImportError as error:
        raise ImportError(
            f"wmengine._cuda does not load ({error}): put nvcc on PATH and install wmengine again with WMENGINE_CUDA=ON"
        ) from error
    return _cuda


def _place(tensor: Tensor) -> tuple[int, int]:
    """(device, stream) for `_cuda`; raises TypeError for a tensor that is not on a GPU."""
    if tensor.device.type != "cuda":
        raise TypeError(f"this operator runs on CUDA tensors, not on {tensor.device}")
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _floats(tensor: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=tensor.device)


def project(values: Tensor, key: int, total: int, projection: str, scale: float) -> Tensor:
    """y[total] = scale · P(key)·w for w[M] of any float type, P ``sketch``, ``rademacher`` or ``gaussian``; float32."""
    module, place, w = _compiled(), _place(values), values.float().contiguous()
    y = _floats(w, total)
    if projection == "sketch":
        buckets = padded_buckets(total)
        workspace = _floats(w, module.sketch_workspace(w.numel(), buckets))
        pointers = workspace.data_ptr(), y.data_ptr()
        module.sketch(*place, w.data_ptr(), w.numel(), key, buckets, total, scale, *pointers)
    else:
        kind = _KINDS[projection]
        workspace = _floats(w, module.project_workspace(w.numel(), total, kind))
        pointers = workspace.data_ptr(), y.data_ptr()
        module.project(*place, w.data_ptr(), w.numel(), key, total, kind, scale, *pointers)
    return y


def project_adjoint(
    gradient: Tensor, key: int, count: int, projection: str, scale: float, out: Tensor | None = None
) -> Tensor:
    """scale · P(key)ᵀ·g for g[total] → float32[count]; added to `out`, contiguous float32, where that is given."""
    module, place, g = _compiled(), _place(gradient), gradient.float().contiguous()
    accumulate = out is not None
    if out is None:
        out = _floats(g, count)
    elif out.dtype != torch.float32 or out.numel() != count or not out.is_contiguous() or out.device != g.device:
        raise ValueError(
            f"out must be contiguous float32[{count}] on {g.device}, not {out.dtype}{list(out.shape)} on {out.device}"
        )
    total = g.numel()
    if projection == "sketch":
        buckets = padded_buckets(total)
        module.sketch_adjoint(*place, g.data_ptr(), total, key, buckets, scale, accumulate, count, out.data_ptr())
    else:
        kind = _KINDS[projection]
        module.project_adjoint(*place, g.data_ptr(), total, key, kind, scale, accumulate, count, out.data_ptr())
    return out


def match_counts(outputs: Tensor, expected: Tensor, group: Tensor | None, groups: int, levels: bool) -> MatchCounts:
    """As :func:`wmengine.ops.match_counts`, of outputs that are not float64."""
    check_matching(outputs, expected, group, groups)
    if outputs.dtype not in _SCALARS:
        raise TypeError(f"outputs must be float32, float16 or bfloat16, not {outputs.dtype}")
    module, place, device = _compiled(), _place(outputs), outputs.device
    outputs, labels = outputs.detach().contiguous(), _wide(expected, device)
    of = None if group is None else _wide(group, device)
    rows, classes = outputs.shape
    found = MatchCounts(
        predicted=torch.empty(rows, dtype=torch.int32, device=device),
        at=torch.empty(rows, dtype=torch.int8, device=device),
        histogram=torch.empty((rows, 2 * MOST_LEVEL + 1), dtype=torch.uint32, device=device),
        hits=torch.empty(groups, dtype=torch.int32, device=device),
        invalid=torch.empty(groups, dtype=torch.int32, device=device),
        levels=torch.empty((rows, classes), dtype=torch.int8, device=device) if levels else None,
    )
    module.match_counts(
        *place,
        outputs.data_ptr(),
        _SCALARS[outputs.dtype],
        rows,
        classes,
        labels.data_ptr(),
        0 if of is None else of.data_ptr(),
        groups,
        *(0 if tensor is None else tensor.data_ptr() for tensor in found),
    )
    return found


def label_matches(predicted: Tensor, expected: Tensor) -> Tensor:
    """int32[S, K]: places at which labels predicted[S, N] and expected[K, N] agree; a negative label never does."""
    check_labels(predicted, expected)
    module, place = _compiled(), _place(predicted)
    predicted = (predicted if predicted.dtype in _INTEGERS else predicted.long()).contiguous()
    labels = _wide(expected, predicted.device)
    suspects, rows = predicted.shape
    counts = torch.empty((suspects, labels.shape[0]), dtype=torch.int32, device=predicted.device)
    module.label_matches(
        *place,
        predicted.data_ptr(),
        _INTEGERS[predicted.dtype],
        suspects,
        rows,
        labels.data_ptr(),
        labels.shape[0],
        counts.data_ptr(),
    )
    return counts


def _wide(labels: Tensor, device: torch.device) -> Tensor:
    return labels.to(device, torch.int64).contiguous()


def bit_matches(messages: Tensor, registry: Tensor, total: int) -> Tensor:
    """int32[S, K]: equal bits among the first `total` of packed messages[S, B] and registry[K, B].

    Both are uint8 with B = ⌈total / 8⌉, bit t in byte t // 8, the lowest first; bits past `total` do not count.
    """
    messages, registry, place = _packed(messages, registry, total)
    counts = torch.empty((messages.shape[0], registry.shape[0]), dtype=torch.int32, device=messages.device)
    if not total:
        return counts.zero_()
    _compiled().bit_matches(
        *place,
        messages.data_ptr(),
        messages.shape[0],
        registry.data_ptr(),
        registry.shape[0],
        total,
        counts.data_ptr(),
    )
    return counts


def best_bit_matches(messages: Tensor, registry: Tensor, total: int, best: int) -> tuple[Tensor, Tensor]:
    """(counts int32[S, best], indices int64[S, best]): of `bit_matches`, each message's greatest, most matches first.

    Equal counts go to the lower index; the S × K counts are never stored. `best` is at most 1024.
    """
    messages, registry, place = _packed(messages, registry, total)
    suspects, registered = messages.shape[0], registry.shape[0]
    module = _compiled()
    size = module.best_bit_matches_workspace(suspects, registered, best)  # a ValueError where there is no such best
    if not total:  # all are tied
        counts = torch.zeros((suspects, best), dtype=torch.int32, device=messages.device)
        return counts, torch.arange(best, device=messages.device).repeat(suspects, 1)
    workspace = torch.empty(size, dtype=torch.int64, device=messages.device)
    counts = torch.empty((suspects, best), dtype=torch.int32, device=messages.device)
    indices = torch.empty((suspects, best), dtype=torch.int64, device=messages.device)
    module.best_bit_matches(
        *place,
        messages.data_ptr(),
        suspects,
        registry.data_ptr(),
        registered,
        total,
        best,
        workspace.data_ptr(),
        counts.data_ptr(),
        indices.data_ptr(),
    )
    return counts, indices


def _packed(messages: Tensor, registry: Tensor, total: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Both as contiguous rows of bytes on the messages' device, and the place to run."""
    rows = [PackedBits(value.to(messages.device), total).data.contiguous() for value in (messages, registry)]
    return rows[0], rows[1], _place(messages)


def embedding_loss_forward(
    weights: Sequence[Tensor],
    keys: Sequence[int],
    bits: Tensor,
    carrier: str,
    projection: str,
    link: str,
    margin: float,
    scale: float,
    total: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, y[total], residual[total] = dloss/dy, inverse norms[Σ filters] or empty), all float32, of weights [O, …].

    Weights are float32, float16 or bfloat16, mixed as they come; bits[total] hold 0 and 1.
    """
    kernels = require("wmengine.kernels.embedding_loss", extra="train")
    bits = (bits != 0).to(torch.uint8).contiguous()  # looking for other values would wait for the device
    with _current(weights[0].device):
        result: tuple[Tensor, Tensor, Tensor, Tensor] = kernels.forward(
            weights, keys, bits, carrier, projection, link, float(margin), float(scale), total
        )
    return result


def embedding_loss_backward(
    grad_loss: Tensor,
    weights: Sequence[Tensor],
    keys: Sequence[int],
    residual: Tensor,
    norms: Tensor,
    carrier: str,
    projection: str,
    scale: float,
) -> list[Tensor]:
    """The gradient by each weight, in the weight's shape and dtype, from what the forward call returned."""
    kernels = require("wmengine.kernels.embedding_loss", extra="train")
    with _current(weights[0].device):
        result: list[Tensor] = kernels.backward(
            grad_loss.float(), weights, keys, residual.contiguous(), norms, carrier, projection, float(scale)
        )
    return result


def marked_cross_entropy_forward(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    group: Tensor | None,
    groups: int,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, group_loss[G], group_hits int64[G], normalizers[N, 2], denominator) of logits[N, C]; others are float32.

    `reduction` is ``mean`` or ``sum`` (denominator 1). A label outside 0..C−1 or a group outside 0..G−1, in a row that
    is not ignored, makes the loss NaN: a GPU cannot raise without waiting.
    """
    kernels = require("wmengine.kernels.cross_entropy", extra="train")
    with _current(logits.device):
        result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = kernels.forward(
            rows_of(logits),
            labels.long().contiguous(),
            None if weight is None else weight.float().contiguous(),
            None if group is None else group.long().contiguous(),
            groups,
            float(label_smoothing),
            ignore_index,
            reduction,
        )
    return result


def marked_cross_entropy_backward(
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    normalizers: Tensor,
    denominator: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    """The gradient by the logits, in their shape and dtype, from what the forward call returned."""
    kernels = require("wmengine.kernels.cross_entropy", extra="train")
    with _current(logits.device):
        result: Tensor = kernels.backward(
            grad_loss.float(),
            rows_of(logits),
            labels.long().contiguous(),
            None if weight is None else weight.float().contiguous(),
            normalizers,
            denominator,
            float(label_smoothing),
            ignore_index,
        )
    return result


def cross_entropy_in_place(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    group: Tensor | None,
    groups: int,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(Σ wℓ, group_loss float32[G], group_hits int64[G]); logits[N, C] with contiguous rows become the gradient."""
    kernels = require("wmengine.kernels.cross_entropy", extra="train")
    labels = labels.long().contiguous()
    weight = None if weight is None else weight.float().contiguous()
    group = None if group is None else group.long().contiguous()
    settings = float(label_smoothing), ignore_index
    with _current(logits.device):
        loss, group_loss, group_hits, normalizers, denominator = kernels.forward(
            logits, labels, weight, group, groups, *settings, "sum"
        )
        kernels.backward(denominator, logits, labels, weight, normalizers, denominator, *settings, gradient=logits)
    return loss, group_loss, group_hits


def cross_entropy_into(
    gradient: Tensor,
    factor: Tensor,
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    group: Tensor | None,
    groups: int,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(Σ wℓ, group_loss float32[G], group_hits int64[G]); gradient[N, C], of any type, becomes factor · that of Σ wℓ.

    Labels and group are contiguous int64[N], weight is contiguous float32[N].
    """
    kernels = require("wmengine.kernels.cross_entropy", extra="train")
    settings = float(label_smoothing), ignore_index
    with _current(logits.device):
        loss, group_loss, group_hits, normalizers, denominator = kernels.forward(
            logits, labels, weight, group, groups, *settings, "sum"
        )
        kernels.backward(factor, logits, labels, weight, normalizers, denominator, *settings, gradient=gradient)
    return loss, group_loss, group_hits
