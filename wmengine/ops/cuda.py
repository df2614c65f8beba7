"""The operators for CUDA tensors: `_cuda` (CUDA C++) for projections and counts, Triton for the training losses.

Every call queues its work on the current stream of the tensor's device and returns without waiting for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import ModuleType

import torch

from wmengine._optional import require
from wmengine.ops.reference import padded_buckets

Tensor = torch.Tensor

_KINDS = {"rademacher": 0, "gaussian": 1}
_SCALARS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


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


def match_counts(outputs: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """(counts int32[S, K], invalid int32[S]) of outputs[S, N, C], not float64, against labels expected[K, N]."""
    if outputs.dtype not in _SCALARS:
        raise TypeError(f"outputs must be float32, float16 or bfloat16, not {outputs.dtype}")
    suspects, rows, classes = outputs.shape
    if expected.ndim != 2 or expected.shape[1] != rows:
        raise ValueError(
            f"expected must have shape [K, {rows}] for outputs {tuple(outputs.shape)}, not {tuple(expected.shape)}"
        )
    if expected.is_floating_point() or expected.is_complex():
        raise TypeError(f"expected must be integer labels, not {expected.dtype}")
    module, place = _compiled(), _place(outputs)
    outputs, labels = outputs.detach().contiguous(), expected.to(outputs.device, torch.int64).contiguous()
    sets = labels.shape[0]
    predicted, counts, invalid = (
        torch.empty(shape, dtype=torch.int32, device=outputs.device)
        for shape in (suspects * rows, (suspects, sets), suspects)
    )
    module.match_counts(
        *place,
        outputs.data_ptr(),
        _SCALARS[outputs.dtype],
        suspects,
        rows,
        classes,
        labels.data_ptr(),
        sets,
        predicted.data_ptr(),
        counts.data_ptr(),
        invalid.data_ptr(),
    )
    return counts, invalid


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
    bits = bits.to(torch.uint8).contiguous()
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
    """(loss, group_loss float32[G], group_hits int64[G], lse float32[N], denominator float32) of logits[N, C].

    `reduction` is ``mean`` or ``sum`` (denominator 1). A label outside 0..C−1 that is not ignored makes the loss NaN: a
    GPU cannot raise without waiting.
    """
    kernels = require("wmengine.kernels.cross_entropy", extra="train")
    with _current(logits.device):
        result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = kernels.forward(
            _rows(logits),
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
    lse: Tensor,
    denominator: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    """The gradient by the logits, in their shape and dtype, from what the forward call returned."""
    kernels = require("wmengine.kernels.cross_entropy", extra="train")
    with _current(logits.device):
        result: Tensor = kernels.backward(
            grad_loss.float(),
            _rows(logits),
            labels.long().contiguous(),
            None if weight is None else weight.float().contiguous(),
            lse,
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
        loss, group_loss, group_hits, lse, denominator = kernels.forward(
            logits, labels, weight, group, groups, *settings, "sum"
        )
        kernels.backward(denominator, logits, labels, weight, lse, denominator, *settings, gradient=logits)
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
        loss, group_loss, group_hits, lse, denominator = kernels.forward(
            logits, labels, weight, group, groups, *settings, "sum"
        )
        kernels.backward(factor, logits, labels, weight, lse, denominator, *settings, gradient=gradient)
    return loss, group_loss, group_hits


def _rows(logits: Tensor) -> Tensor:
    """Logits whose classes lie side by side; rows may be any distance apart."""
    return logits if logits.stride(1) == 1 else logits.contiguous()
