"""The operators for torch tensors: schemas in torch.library, autograd around them, CPU and CUDA implementations below.

`define` + `impl` + `register_fake` with an `autograd.Function` outside costs a seventh of `custom_op` with
`register_autograd`, and `torch.compile(fullgraph=True)` traces through it. float64 runs the plain formulas of
:mod:`wmengine.ops.torch_reference`; float16 and bfloat16 are widened on a CPU and read as they are on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from wmengine import _cpu
from wmengine.ops import torch_reference
from wmengine.ops.cpu import check_choice, check_count, check_key
from wmengine.ops.reference import CARRIERS, LINKS, PROJECTIONS, projection_scale

Tensor = torch.Tensor

_LIBRARY = torch.library.Library("wmengine", "DEF")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_UNIT_CARRIERS = ("unit_filters", "unit_filter_mean")
_MEAN_CARRIERS = ("filter_mean", "unit_filter_mean")


class MarkedCrossEntropy(NamedTuple):
    """loss: scalar, differentiable; group_loss: float32[G], Σ wℓ of each group; group_hits: int64[G]."""

    loss: Tensor
    group_loss: Tensor
    group_hits: Tensor


def _define(schema: str, cpu: Any, cuda: Any, fake: Any) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"wmengine::{name}", fake, lib=_LIBRARY)


def _cuda() -> Any:
    """The GPU fronts, loaded when the first CUDA tensor arrives: they need Triton and the compiled ``_cuda``."""
    from wmengine.ops import cuda

    return cuda


def _unsigned(key: int) -> int:
    return key & 0xFFFF_FFFF_FFFF_FFFF


def _signed(key: int) -> int:
    """A 64-bit key as torch's schemas carry it."""
    key = check_key(key)
    return key - (1 << 64) if key >= 1 << 63 else key


def _check_tensor(name: str, value: object, dimensions: int | None = None) -> Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch tensor, not {type(value).__name__}")
    if value.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, not {value.dtype}")
    if dimensions is not None and value.ndim != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimension(s), not shape {tuple(value.shape)}")
    return value


# --- sketch and project -----------------------------------------------------------------------------------------------


def _project_cpu(values: Tensor, key: int, total: int, projection: str) -> Tensor:
    values = values.contiguous()
    y = torch.empty(total, dtype=torch.float32)
    _cpu.carrier_projection(
        [(values.data_ptr(), 0, 1, values.numel(), _unsigned(key))],
        CARRIERS.index("flat"),
        PROJECTIONS.index(projection),
        total,
        projection_scale(total, values.numel(), projection),
        0,
        y.data_ptr(),
    )
    return y


def _project_adjoint_cpu(gradient: Tensor, key: int, count: int, projection: str) -> Tensor:
    gradient = gradient.contiguous()
    out = torch.empty(count, dtype=torch.float32)
    _cpu.projection_adjoint(
        gradient.data_ptr(),
        gradient.numel(),
        count,
        _unsigned(key),
        PROJECTIONS.index(projection),
        projection_scale(gradient.numel(), count, projection),
        False,
        out.data_ptr(),
    )
    return out


def _project_cuda(values: Tensor, key: int, total: int, projection: str) -> Tensor:
    scale = projection_scale(total, values.numel(), projection)
    result: Tensor = _cuda().project(values, _unsigned(key), total, projection, scale)
    return result


def _project_adjoint_cuda(gradient: Tensor, key: int, count: int, projection: str) -> Tensor:
    scale = projection_scale(gradient.numel(), count, projection)
    result: Tensor = _cuda().project_adjoint(gradient, _unsigned(key), count, projection, scale)
    return result


_define(
    "project(Tensor values, int key, int total, str projection) -> Tensor",
    _project_cpu,
    _project_cuda,
    lambda values, key, total, projection: values.new_empty(total, dtype=torch.float32),
)
_define(
    "project_adjoint(Tensor gradient, int key, int count, str projection) -> Tensor",
    _project_adjoint_cpu,
    _project_adjoint_cuda,
    lambda gradient, key, count, projection: gradient.new_empty(count, dtype=torch.float32),
)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, key: int, total: int, projection: str) -> Tensor:
        ctx.key, ctx.count, ctx.projection = key, values.numel(), projection
        return torch.ops.wmengine.project(values, key, total, projection)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _ProjectAdjoint.apply(gradients[0], ctx.key, ctx.count, ctx.projection), None, None, None  # type: ignore[no-untyped-call]


class _ProjectAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, key: int, count: int, projection: str) -> Tensor:
        ctx.key, ctx.total, ctx.projection = key, gradient.numel(), projection
        return torch.ops.wmengine.project_adjoint(gradient, key, count, projection)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _Project.apply(gradients[0], ctx.key, ctx.total, ctx.projection), None, None, None  # type: ignore[no-untyped-call]


def _project(values: Tensor, key: int, total: int, projection: str) -> Tensor:
    values, total = _check_tensor("values", values, 1), check_count("total", total)
    if values.dtype == torch.float64:
        return torch_reference.project(values, check_key(key), total, projection)
    return _Project.apply(values.float(), _signed(key), total, projection)  # type: ignore[no-untyped-call, no-any-return]


def _project_adjoint(gradient: Tensor, key: int, count: int, projection: str) -> Tensor:
    gradient = _check_tensor("gradient", gradient, 1)
    check_count("the number of symbols in gradient", gradient.numel())
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"count must be an int of at least 0, not {count!r}")
    if gradient.dtype == torch.float64:
        return torch_reference.project_adjoint(gradient, check_key(key), count, projection)
    return _ProjectAdjoint.apply(gradient.float(), _signed(key), count, projection)  # type: ignore[no-untyped-call, no-any-return]


def sketch(values: Tensor, key: int, total: int) -> Tensor:
    """See :func:`wmengine.ops.sketch`."""
    return _project(values, key, total, "sketch")


def sketch_adjoint(gradient: Tensor, key: int, count: int) -> Tensor:
    """See :func:`wmengine.ops.sketch_adjoint`."""
    return _project_adjoint(gradient, key, count, "sketch")


def project(values: Tensor, key: int, total: int, kind: str = "rademacher") -> Tensor:
    """See :func:`wmengine.ops.project`."""
    return _project(values, key, total, check_choice("kind", kind, PROJECTIONS[1:]))


def project_adjoint(gradient: Tensor, key: int, count: int, kind: str = "rademacher") -> Tensor:
    """See :func:`wmengine.ops.project_adjoint`."""
    return _project_adjoint(gradient, key, count, check_choice("kind", kind, PROJECTIONS[1:]))


# --- embedding_loss ---------------------------------------------------------------------------------------------------


def carrier_size(weights: Sequence[Tensor], carrier: str) -> int:
    """M: the values that the carrier reads from all the weights [filters, …]."""
    if carrier in _MEAN_CARRIERS:
        return sum(w.numel() // w.shape[0] if w.shape[0] else 0 for w in weights)
    return sum(w.numel() for w in weights)


def _norm_count(weights: Sequence[Tensor], carrier: str) -> int:
    return sum(w.shape[0] for w in weights) if carrier in _UNIT_CARRIERS else 0


def _tuples(
    weights: Sequence[Tensor], keys: Sequence[int], gradients: Sequence[Tensor] | None
) -> list[tuple[int, int, int, int, int]]:
    result = []
    for index, (weight, key) in enumerate(zip(weights, keys, strict=True)):
        filters = weight.shape[0]
        size = weight.numel() // filters if filters else 0
        target = 0 if gradients is None else gradients[index].data_ptr()
        result.append((weight.data_ptr(), target, filters, size, _unsigned(key)))
    return result


def _embedding_loss_cpu(
    weights: Sequence[Tensor],
    keys: Sequence[int],
    bits: Tensor,
    carrier: str,
    projection: str,
    link: str,
    margin: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = [w.contiguous() for w in weights]
    bits = bits.to(torch.uint8).contiguous()
    total = bits.numel()
    norms = torch.empty(_norm_count(weights, carrier), dtype=torch.float32)
    y, residual = torch.empty(total, dtype=torch.float32), torch.empty(total, dtype=torch.float32)
    _cpu.carrier_projection(
        _tuples(weights, keys, None),
        CARRIERS.index(carrier),
        PROJECTIONS.index(projection),
        total,
        scale,
        norms.data_ptr(),
        y.data_ptr(),
    )
    loss = _cpu.link_loss(y.data_ptr(), bits.data_ptr(), total, LINKS.index(link), margin, residual.data_ptr())
    return torch.tensor(loss, dtype=torch.float32), y, residual, norms


def _embedding_loss_cuda(
    weights: Sequence[Tensor],
    keys: Sequence[int],
    bits: Tensor,
    carrier: str,
    projection: str,
    link: str,
    margin: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    unsigned = [_unsigned(key) for key in keys]
    loss, y, residual, norms = _cuda().embedding_loss_forward(
        list(weights), unsigned, bits, carrier, projection, link, margin, scale, bits.numel()
    )
    return loss, y, residual, norms


def _embedding_loss_fake(
    weights: Sequence[Tensor],
    keys: Sequence[int],
    bits: Tensor,
    carrier: str,
    projection: str,
    link: str,
    margin: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new = weights[0].new_empty
    total = bits.numel()
    return (
        new((), dtype=torch.float32),
        new(total, dtype=torch.float32),
        new(total, dtype=torch.float32),
        new(_norm_count(weights, carrier), dtype=torch.float32),
    )


_define(
    "embedding_loss(Tensor[] weights, int[] keys, Tensor bits, str carrier, str projection, str link, float margin, "
    "float scale) -> (Tensor loss, Tensor y, Tensor residual, Tensor norms)",
    _embedding_loss_cpu,
    _embedding_loss_cuda,
    _embedding_loss_fake,
)


def _embedding_loss_backward_cpu(
    gradient: Tensor,
    weights: Sequence[Tensor],
    keys: Sequence[int],
    residual: Tensor,
    norms: Tensor,
    carrier: str,
    projection: str,
    scale: float,
) -> list[Tensor]:
    weights = [w.contiguous() for w in weights]
    residual = residual.contiguous()
    out = [torch.empty(w.shape, dtype=torch.float32) for w in weights]
    _cpu.embedding_backward(
        _tuples(weights, keys, out),
        CARRIERS.index(carrier),
        PROJECTIONS.index(projection),
        residual.numel(),
        scale * float(gradient),
        norms.data_ptr(),
        residual.data_ptr(),
    )
    return out


def _embedding_loss_backward_cuda(
    gradient: Tensor,
    weights: Sequence[Tensor],
    keys: Sequence[int],
    residual: Tensor,
    norms: Tensor,
    carrier: str,
    projection: str,
    scale: float,
) -> list[Tensor]:
    unsigned = [_unsigned(key) for key in keys]
    result: list[Tensor] = _cuda().embedding_loss_backward(
        gradient, list(weights), unsigned, residual, norms, carrier, projection, scale
    )
    return result


_define(
    "embedding_loss_backward(Tensor gradient, Tensor[] weights, int[] keys, Tensor residual, Tensor norms, "
    "str carrier, str projection, float scale) -> Tensor[]",
    _embedding_loss_backward_cpu,
    _embedding_loss_backward_cuda,
    lambda gradient, weights, keys, residual, norms, carrier, projection, scale: [
        w.new_empty(w.shape, dtype=torch.float32) for w in weights
    ],
)


class _EmbeddingLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        keys: Sequence[int],
        bits: Tensor,
        carrier: str,
        projection: str,
        link: str,
        margin: float,
        scale: float,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        loss, y, residual, norms = torch.ops.wmengine.embedding_loss(
            weights, keys, bits, carrier, projection, link, margin, scale
        )
        ctx.save_for_backward(residual, norms, *weights)
        ctx.mark_non_differentiable(y)
        ctx.settings = (keys, carrier, projection, scale)
        return loss, y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        residual, norms, *weights = ctx.saved_tensors
        keys, carrier, projection, scale = ctx.settings
        by_weight = torch.ops.wmengine.embedding_loss_backward(
            gradients[0], weights, keys, residual, norms, carrier, projection, scale
        )
        return (None, None, None, None, None, None, None, *by_weight)


def embedding_loss(
    weights: Sequence[Tensor],
    keys: Sequence[int],
    bits: Tensor,
    *,
    carrier: str,
    projection: str,
    link: str,
    margin: float = 1.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Watermark regulariser over many layers: carrier → projection → link against bits[T] → (loss, y[T]).

    `weights` are live tensors [filters, …], each with its own key; y = scale · Σ_l P(key_l) v_l. Carriers: ``flat``,
    ``unit_filters`` (each filter over its norm), ``filter_mean``, ``unit_filter_mean``. Projections: ``sketch``,
    ``rademacher``, ``gaussian``. Links, with s = 2b−1, summed over the bits: ``bce`` softplus(−s·y), ``hinge``
    relu(margin − s·y), ``mse`` (y − margin·s)², ``stdm`` softplus(−10·s·sin(10·y)). `scale` defaults to √(P/M) for a
    sketch and 1/√M for a dense projection, M the carrier's values in all. Differentiable by the weights; y is not.
    Source: Uchida et al. 2017 (bce), Li, Tondi, Barni 2021 (stdm).
    """
    weights, keys = list(weights), list(keys)
    if not weights or len(weights) != len(keys):
        raise ValueError(f"embedding_loss needs one key for each weight: {len(weights)} weights, {len(keys)} keys")
    check_choice("carrier", carrier, CARRIERS)
    check_choice("projection", projection, PROJECTIONS)
    check_choice("link", link, LINKS)
    for index, weight in enumerate(weights):
        _check_tensor(f"weights[{index}]", weight)
        if weight.ndim < 1:
            raise ValueError(f"weights[{index}] must have filters on its first axis, not be a scalar")
        if weight.device != weights[0].device:
            raise ValueError(f"weights[{index}] is on {weight.device}, weights[0] on {weights[0].device}: use one device")
    if not isinstance(bits, torch.Tensor) or bits.ndim != 1 or bits.numel() < 1:
        raise ValueError("bits must be a tensor of one dimension with at least one bit")
    if bits.device != weights[0].device:
        raise ValueError(f"bits are on {bits.device}, the weights on {weights[0].device}: move the bits")
    if scale is None:
        scale = projection_scale(bits.numel(), carrier_size(weights, carrier), projection)
    unsigned = [check_key(key) for key in keys]
    if any(w.dtype == torch.float64 for w in weights):
        return torch_reference.embedding_loss(weights, unsigned, bits, carrier, projection, link, margin, scale)
    if weights[0].device.type == "cpu":
        weights = [w.float() for w in weights]
    loss, y = _EmbeddingLoss.apply(  # type: ignore[no-untyped-call]
        [_signed(key) for key in unsigned], bits, carrier, projection, link, float(margin), float(scale), *weights
    )
    return loss, y


# --- marked_cross_entropy ---------------------------------------------------------------------------------------------

# On a CPU the forward pass writes the gradient while each row of logits is in the cache (`gradient`); on a GPU it keeps
# the log-sum-exp of each row and the denominator (`lse`, `denominator`), and the backward pass reads the logits again.


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
    loss, group_loss, group_hits, lse, denominator = _cuda().marked_cross_entropy_forward(
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


_define(
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
    result: Tensor = _cuda().marked_cross_entropy_backward(
        gradient, logits, labels, weight, lse, denominator, label_smoothing, ignore_index
    )
    return result


_LIBRARY.define(
    "marked_cross_entropy_backward(Tensor gradient, Tensor logits, Tensor labels, Tensor? weight, Tensor lse, "
    "Tensor denominator, float label_smoothing, int ignore_index) -> Tensor"
)
_LIBRARY.impl("marked_cross_entropy_backward", _cross_entropy_backward_cuda, "CUDA")
torch.library.register_fake(
    "wmengine::marked_cross_entropy_backward",
    lambda gradient, logits, labels, weight, lse, denominator, label_smoothing, ignore_index: torch.empty_like(logits),
    lib=_LIBRARY,
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

    logits[N, C], labels int64[N], weight[N] or None for 1, group int64[N] or None for 0. ``mean`` divides Σ wℓ by Σ w of
    the rows not ignored, ``sum`` does not. group_loss holds Σ wℓ and group_hits the rows whose argmax is their label, by
    group; only `loss` is differentiable. A NaN row makes the loss NaN and is never a hit. A label outside 0..C−1 raises
    ValueError on a CPU; on a GPU, which cannot raise without waiting, it makes the loss NaN.
    """
    _check_tensor("logits", logits, 2)
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


def match_counts(outputs: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`wmengine.ops.match_counts`; on a CPU the tensors are read through NumPy, without a copy."""
    _check_tensor("outputs", outputs, 3)
    expected = torch.as_tensor(expected, device=outputs.device)
    if outputs.device.type == "cuda" and outputs.dtype != torch.float64:
        counts, invalid = _cuda().match_counts(outputs, expected)
        return counts, invalid
    from wmengine.ops import cpu

    answers = outputs.detach()
    answers = answers.float() if answers.dtype == torch.bfloat16 else answers
    counted, bad = cpu.match_counts(answers.cpu().numpy(), expected.cpu().numpy())
    return torch.from_numpy(counted).to(outputs.device), torch.from_numpy(bad).to(outputs.device)
