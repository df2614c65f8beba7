"""Carrier → projection → link over many layers, forward and backward, in a few launches whatever the number of layers.

A bare projection is that of one layer without a carrier or a link.

Forward: inverse norms of filters and means over filters where the carrier has them, partial sums of the projection,
their sum in a fixed order, and one program for link, loss and residual. Backward: the adjoint of the residual for every
value, carried back through mean and norm. Nothing waits for the GPU: the outer gradient is read on the device.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from wmengine.kernels import carriers, launches, layers
from wmengine.kernels import projection as projections

Tensor = torch.Tensor

GROUPS_STEP = tl.constexpr(256)  # partial sums of each column that a program takes at a time

BCE = tl.constexpr(0)
HINGE = tl.constexpr(1)
MSE = tl.constexpr(2)
STDM = tl.constexpr(3)

_PROJECTIONS = {
    "sketch": layers.SKETCH.value,
    "rademacher": layers.RADEMACHER.value,
    "gaussian": layers.GAUSSIAN.value,
}
_LINKS = {"bce": BCE.value, "hinge": HINGE.value, "mse": MSE.value, "stdm": STDM.value}
_TYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@triton.jit
def total_kernel(partials, y, groups, width, total, scale):
    """y[t] = scale · Σ partials[groups, width] by column, 32 columns a program, always in the same order."""
    column = tl.program_id(0) * 32 + tl.arange(0, 32)
    step = tl.arange(0, GROUPS_STEP)
    sums = tl.zeros((GROUPS_STEP, 32), tl.float32)
    for first in range(0, groups, GROUPS_STEP):
        group = first + step
        inside = (group < groups)[:, None] & (column < total)[None, :]
        sums += tl.load(partials + group.to(tl.int64)[:, None] * width + column[None, :], mask=inside, other=0.0)
    tl.store(y + column, tl.sum(sums, axis=0) * scale, mask=column < total)


@triton.jit
def softplus(x):
    """ln(1 + eˣ), exact to float32 where eˣ is tiny too."""
    e = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + tl.where(e < 1e-3, e - 0.5 * e * e, tl.log(1.0 + e))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def link_kernel(y, bits, residual, loss, total, margin, LINK: tl.constexpr):
    """loss = Σ_t link(y_t, bit_t) and residual[t] = its derivative by y_t; one program."""
    step = tl.arange(0, 1024)
    losses = tl.zeros((1024,), tl.float32)
    for first in range(0, total, 1024):
        t = first + step
        inside = t < total
        z = tl.load(y + t, mask=inside, other=0.0)
        s = 2.0 * tl.load(bits + t, mask=inside, other=0).to(tl.float32) - 1.0
        if LINK == BCE:
            term = softplus(-s * z)
            slope = -s * sigmoid(-s * z)
        elif LINK == HINGE:
            gap = margin - s * z
            term = tl.where(gap > 0, gap, 0.0 * gap)  # 0·NaN keeps the NaN
            slope = tl.where(gap > 0, -s, 0.0 * gap)
        elif LINK == MSE:
            term = (z - margin * s) * (z - margin * s)
            slope = 2.0 * (z - margin * s)
        else:  # alpha = beta = 10 (Li, Tondi, Barni 2021)
            inner = 10.0 * tl.sin(10.0 * z)
            term = softplus(-s * inner)
            slope = -s * sigmoid(-s * inner) * (100.0 * tl.cos(10.0 * z))
        losses += tl.where(inside, term, 0.0)
        tl.store(residual + t, slope, mask=inside)
    tl.store(loss, tl.sum(losses, axis=0))


class _Call:
    """One call's weights and settings, and the launches that forward and backward share."""

    def __init__(
        self, weights: Sequence[Tensor], keys: Sequence[int], total: int, carrier: str, projection: str, scale: float
    ) -> None:
        self.weights = [weight.contiguous() for weight in weights]
        self.total, self.scale = total, scale
        self.unit = carrier in ("unit_filters", "unit_filter_mean")
        self.mean = carrier in ("filter_mean", "unit_filter_mean")
        self.projection = _PROJECTIONS[projection]
        self.device = weights[0].device
        shapes = tuple((w.shape[0], w.numel() // w.shape[0] if w.shape[0] else 0) for w in self.weights)
        dtypes = tuple(w.dtype for w in self.weights)
        plain = tuple(key & 0xFFFF_FFFF_FFFF_FFFF for key in keys)  # torch's schemas carry them signed
        self.plan = layers.make_plan(shapes, dtypes, plain, total, self.mean, self.projection, self.device)
        for batch in self.plan.batches:
            layers.in_use(batch.table)

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def addresses(self, batch: layers.Batch, tensors: Sequence[Tensor]) -> Tensor:
        return layers.address_table([tensors[index] for index in batch.indices], self.device)

    def padded(self, residual: Tensor) -> Tensor:
        """A residual as long as a sketch has buckets: what those past the last bit receive, they give to no weight."""
        missing = self.plan.buckets - self.total if self.projection == layers.SKETCH.value else 0
        return torch.nn.functional.pad(residual, (0, missing)) if missing else residual.contiguous()

    def sketch_tables(self, batch: layers.Batch) -> tuple[Tensor, Tensor]:
        """Sign words and bucket offsets of a sketch, empty for a dense projection."""
        blocks = batch.blocks if self.projection == layers.SKETCH.value else 0
        words = torch.empty(blocks * 128, dtype=torch.int32, device=self.device)
        runs = max(1, layers.BLOCK.value // self.plan.buckets)
        offsets = torch.empty(blocks * runs, dtype=torch.int32, device=self.device)
        if blocks:
            projections.sketch_tables_kernel[(blocks,)](
                batch.table,
                words,
                offsets,
                BUCKETS=self.plan.buckets,
                LAYERS=batch.layers,
                **launches.chosen("sketch_tables").options(),
            )
        return words, offsets

    def adjoint(
        self, batch: layers.Batch, factor: Tensor, residual: Tensor, outputs: Tensor, scratch: Tensor | None
    ) -> None:
        """factor · scale · Pᵀ residual for every value, written to `scratch` or, without it, to the `outputs`."""
        words, offsets = self.sketch_tables(batch)
        if not batch.blocks:
            return

        def call(launch: launches.Launch) -> None:
            projections.adjoint_kernel[(batch.blocks,)](
                factor,
                self.scale,
                residual,
                outputs,
                residual if scratch is None else scratch,
                batch.table,
                words,
                offsets,
                self.total,
                BUCKETS=self.plan.buckets,
                LAYERS=batch.layers,
                DTYPE=_TYPES[batch.dtype],
                SCRATCH=scratch is not None,
                PROJECTION=self.projection,
                **launch.options(),
            )

        kernel = "sketch_adjoint" if self.projection == layers.SKETCH.value else "dense_adjoint"
        launches.run(kernel, batch.blocks * layers.BLOCK.value, batch.dtype, self.device, call)

    def sums(self, signs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(y[T] = scale · Σ P(key) v, inverse norms[Σ filters] times signs, empty for carriers without)."""
        plan, total = self.plan, self.total
        y = self.floats(total)
        norms = self.floats(plan.filters if self.unit else 0)
        values = self.floats(plan.values if self.mean else 0)
        width = plan.buckets if self.projection == layers.SKETCH.value else total
        groups = sum(batch.groups for batch in plan.batches)
        partials = self.floats(groups, width)
        first = 0
        every = [self.addresses(batch, self.weights) for batch in plan.batches]
        for batch, pointers in zip(plan.batches, every, strict=True):
            if self.unit and batch.filter_tiles:
                carriers.inverse_norms_kernel[(batch.filter_tiles,)](
                    pointers,
                    batch.table,
                    norms,
                    LAYERS=batch.layers,
                    DTYPE=_TYPES[batch.dtype],
                    **launches.chosen("inverse_norms").options(),
                )
        if signs is not None:
            norms *= signs
        for batch, pointers in zip(plan.batches, every, strict=True):
            shared = {"LAYERS": batch.layers, "DTYPE": _TYPES[batch.dtype]}
            if self.mean and batch.column_tiles:
                carriers.column_means_kernel[(batch.column_tiles,)](
                    pointers,
                    batch.table,
                    norms,
                    values,
                    **shared,
                    UNIT=self.unit,
                    **launches.chosen("column_means").options(),
                )
            shared |= {"SCRATCH": self.mean, "UNIT": self.unit and not self.mean}
            own = partials[first : first + batch.groups]
            first += batch.groups
            if not batch.groups:
                continue
            if self.projection == layers.SKETCH.value:
                words, offsets = self.sketch_tables(batch)
                grid = (batch.groups, max(1, plan.buckets // layers.BLOCK.value))
                projections.sketch_sums_kernel[grid](
                    pointers,
                    values,
                    batch.table,
                    norms,
                    words,
                    offsets,
                    own,
                    BUCKETS=plan.buckets,
                    **shared,
                    **launches.chosen("sketch_sums").options(),
                )
            else:
                grid = (batch.groups, triton.cdiv(total, projections.DENSE_TILE.value))
                projections.dense_sums_kernel[grid](
                    pointers,
                    values,
                    batch.table,
                    norms,
                    own,
                    total,
                    **shared,
                    PROJECTION=self.projection,
                    **launches.chosen("dense_sums").options(),
                )
        total_kernel[(triton.cdiv(total, 32),)](
            partials, y, groups, width, total, self.scale, **launches.chosen("total").options()
        )
        return y, norms


def forward(
    weights: Sequence[Tensor],
    bits: Tensor,
    keys: Sequence[int],
    carrier: str,
    projection: str,
    scale: float,
    link: str,
    margin: float,
    signs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, y[T], residual[T] = dloss/dy, inverse norms[Σ filters], empty for carriers without); all float32.

    Weights are float32, float16 or bfloat16, mixed as they come; bits[T] hold 0 and 1.
    """
    total = bits.numel()
    bits = (bits != 0).to(torch.uint8).contiguous()  # looking for other values would wait for the device
    call = _Call(weights, keys, total, carrier, projection, scale)
    y, norms = call.sums(signs)
    loss, residual = call.floats(), call.floats(total)
    link_kernel[(1,)](y, bits, residual, loss, total, margin, LINK=_LINKS[link], **launches.chosen("link").options())
    return loss, y, residual, norms


def backward(
    factor: Tensor,
    weights: Sequence[Tensor],
    residual: Tensor,
    norms: Tensor,
    keys: Sequence[int],
    carrier: str,
    projection: str,
    scale: float,
) -> list[Tensor]:
    """The gradient by each weight, in its shape and dtype.

    ``factor`` is the outer gradient, a scalar on the device: it is never read on the host.
    """
    call = _Call(weights, keys, residual.numel(), carrier, projection, scale)
    factor, residual = factor.float(), call.padded(residual)
    gradients = [torch.empty(weight.shape, dtype=weight.dtype, device=call.device) for weight in call.weights]
    sketched = call.projection == layers.SKETCH.value
    stored = call.mean or (call.unit and not sketched)
    values = call.floats(call.plan.values) if stored else None
    for batch in call.plan.batches:
        outputs = call.addresses(batch, gradients)
        if stored or not call.unit:
            call.adjoint(batch, factor, residual, outputs, values)
        if (call.unit or call.mean) and batch.filter_tiles:
            source = carriers.FROM_MEANS if call.mean else carriers.FROM_SKETCH if sketched else carriers.FROM_VALUES
            words, offsets = (residual, residual) if stored else call.sketch_tables(batch)
            carriers.filter_gradients_kernel[(batch.filter_tiles,)](
                factor,
                scale,
                residual,
                call.addresses(batch, call.weights),
                outputs,
                batch.table,
                norms,
                residual if values is None else values,
                words,
                offsets,
                BUCKETS=call.plan.buckets,
                LAYERS=batch.layers,
                DTYPE=_TYPES[batch.dtype],
                UNIT=call.unit,
                SOURCE=source.value,
                **launches.chosen("filter_gradients").options(),
            )
    return gradients


def project(values: Tensor, key: int, total: int, projection: str, scale: float) -> Tensor:
    """float32 y[total] = scale · P(key)·w of w[M]."""
    return _Call([values[None]], [key], total, "flat", projection, scale).sums()[0]


def project_adjoint(gradient: Tensor, key: int, count: int, projection: str, scale: float) -> Tensor:
    """float32[count] = scale · P(key)ᵀ·g of float32 g[total]."""
    result = gradient.new_empty((1, count))
    call = _Call([result], [key], gradient.numel(), "flat", projection, scale)
    (batch,) = call.plan.batches
    call.adjoint(batch, gradient.new_ones(()), call.padded(gradient), call.addresses(batch, [result]), None)
    return result[0]
