"""Cross entropy of task and trigger rows: one pass over the logits forward, one read and one write backward.

Forward, a program takes a tile of rows and walks their classes with a running maximum and sum of exponentials; of each
row it keeps the two: their merger, the log-sum-exp, would lose what a shift of all logits must not change. A row is a
hit where no logit beats its label's: none is greater, none before it is equal, and the sum is a number. A second
kernel, for each group and once for all, adds the rows of a chunk in a fixed order; a third adds the chunks where there
are several, so that no program walks a million rows. Backward runs on a grid of (rows, classes): every logit is read
once, every gradient factor · w · (softmax − target) written once.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

import torch
import triton
import triton.language as tl

from wmengine.kernels import launches

Tensor = torch.Tensor

ROWS_STEP = tl.constexpr(1024)  # rows, or chunks of rows, that are added at a time
CHUNK = tl.constexpr(8192)  # rows that one program adds


@triton.jit
def rows_kernel(
    logits,
    labels,
    weight,
    group,
    normalizers,
    losses,
    denominators,
    hits,
    rows,
    classes,
    stride,
    groups,
    label_smoothing,
    ignore_index,
    WEIGHTED: tl.constexpr,
    GROUPED: tl.constexpr,
    SMOOTH: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Per row: top and Σ exp(x − top), weighted loss, weight (0 where ignored) and hit.

    A label outside 0..C−1 or a group outside 0..G−1 gives NaN.
    """
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    label = tl.load(labels + row, mask=row < rows, other=0)
    kept = (row < rows) & (label != ignore_index)
    known = kept & (label >= 0) & (label < classes)
    if GROUPED:
        own = tl.load(group + row, mask=kept, other=0)
        known = known & (own >= 0) & (own < groups)
    line = logits + row * stride
    chosen = tl.load(line + label, mask=known, other=float("nan")).to(tl.float32)
    top = tl.full((TILE,), float("-inf"), tl.float32)
    exponentials = tl.zeros((TILE,), tl.float32)
    mean = tl.zeros((TILE,), tl.float32)  # Σ (x − top) / C, in halves, so that no difference overflows
    twice = 2.0 / classes
    beaten = tl.zeros((TILE, STEP), tl.int32)
    step = tl.arange(0, STEP)
    for first in range(0, classes, STEP):
        column = first + step
        inside = known[:, None] & (column < classes)[None, :]
        x = tl.load(line[:, None] + column[None, :], mask=inside, other=float("-inf")).to(tl.float32)
        before = column[None, :] < label[:, None]
        beaten |= ((x > chosen[:, None]) | ((x == chosen[:, None]) & before)).to(tl.int32)
        new_top = tl.maximum(top, tl.max(x, axis=1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        exponentials = exponentials * tl.exp(top - shift) + tl.sum(tl.exp(x - shift[:, None]), axis=1)
        if SMOOTH:
            risen = tl.where(top == float("-inf"), 0.0, 0.5 * top - 0.5 * shift)
            below = tl.where(inside, 0.5 * x - 0.5 * shift[:, None], 0.0)
            mean += risen * (first * twice) + tl.sum(below * twice, axis=1)
        top = new_top
    top = tl.where(top == float("-inf"), float("nan"), top)
    logarithm = tl.log(exponentials)
    loss = logarithm + (top - chosen)
    if SMOOTH:  # both parts are at least 0: neither takes from the other
        loss = (1.0 - label_smoothing) * loss + label_smoothing * (logarithm - mean)
    w = tl.where(kept, tl.load(weight + row, mask=kept, other=0.0), 0.0) if WEIGHTED else tl.where(kept, 1.0, 0.0)
    hit = known & (top == top) & (logarithm == logarithm) & (tl.max(beaten, axis=1) == 0)
    tl.store(normalizers + 2 * row, top, mask=row < rows)
    tl.store(normalizers + 2 * row + 1, exponentials, mask=row < rows)
    tl.store(losses + row, tl.where(kept, w * loss, 0.0), mask=row < rows)
    tl.store(denominators + row, w, mask=row < rows)
    tl.store(hits + row, hit.to(tl.int8), mask=row < rows)


@triton.jit
def finish_kernel(
    losses,
    denominators,
    hits,
    group,
    loss,
    denominator,
    group_loss,
    group_hits,
    sums,
    counts,
    rows,
    groups,
    GROUPED: tl.constexpr,
    MEAN: tl.constexpr,
    ALONE: tl.constexpr,
):
    """Of each chunk, program g < groups adds its group's losses and hits, program ``groups`` all losses and weights.

    They are the results where there is one chunk (ALONE), else sums[groups + 2, chunks] and counts[groups, chunks].
    """
    chunk, own = tl.program_id(0) // (groups + 1), tl.program_id(0) % (groups + 1)
    chunks = tl.num_programs(0) // (groups + 1)  # all on one axis: the others take 65535 programs
    begin = chunk.to(tl.int64) * CHUNK
    end = tl.minimum(begin + CHUNK, rows)
    step = tl.arange(0, ROWS_STEP)
    total = tl.zeros((ROWS_STEP,), tl.float32)
    weights = tl.zeros((ROWS_STEP,), tl.float32)
    count = tl.zeros((ROWS_STEP,), tl.int32)
    for first in range(begin, end, ROWS_STEP):
        row = first + step
        member = row < end
        if own < groups:
            member = member & (tl.load(group + row, mask=member, other=-1) == own if GROUPED else own == 0)
            count += tl.load(hits + row, mask=member, other=0).to(tl.int32)
        else:
            weights += tl.load(denominators + row, mask=member, other=0.0)
        total += tl.load(losses + row, mask=member, other=0.0)
    added = tl.sum(total, axis=0)
    if ALONE:
        if own < groups:
            tl.store(group_loss + own, added)
            tl.store(group_hits + own, tl.sum(count, axis=0).to(tl.int64))
        else:
            divisor = tl.sum(weights, axis=0) if MEAN else 1.0
            tl.store(loss, added / divisor)
            tl.store(denominator, divisor)
    else:
        tl.store(sums + own * chunks + chunk, added)
        if own < groups:
            tl.store(counts + own * chunks + chunk, tl.sum(count, axis=0))
        else:
            tl.store(sums + (groups + 1) * chunks + chunk, tl.sum(weights, axis=0))


@triton.jit
def chunks_kernel(sums, counts, loss, denominator, group_loss, group_hits, chunks, groups, MEAN: tl.constexpr):
    """Program g < groups adds the chunks of its group, program ``groups`` those of the loss and of its weights."""
    own = tl.program_id(0)
    step = tl.arange(0, ROWS_STEP)
    total = tl.zeros((ROWS_STEP,), tl.float32)
    weights = tl.zeros((ROWS_STEP,), tl.float32)
    count = tl.zeros((ROWS_STEP,), tl.int64)
    for first in range(0, chunks, ROWS_STEP):
        chunk = first + step
        total += tl.load(sums + own * chunks + chunk, mask=chunk < chunks, other=0.0)
        if own < groups:
            count += tl.load(counts + own * chunks + chunk, mask=chunk < chunks, other=0).to(tl.int64)
        else:
            weights += tl.load(sums + (own + 1) * chunks + chunk, mask=chunk < chunks, other=0.0)
    added = tl.sum(total, axis=0)
    if own < groups:
        tl.store(group_loss + own, added)
        tl.store(group_hits + own, tl.sum(count, axis=0))
    else:
        divisor = tl.sum(weights, axis=0) if MEAN else 1.0
        tl.store(loss, added / divisor)
        tl.store(denominator, divisor)


@triton.jit
def gradient_kernel(
    factor,
    logits,
    labels,
    weight,
    normalizers,
    denominator,
    gradient,
    rows,
    classes,
    stride,
    label_smoothing,
    ignore_index,
    WEIGHTED: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """gradient[rows, classes] = factor / denominator · w · (softmax − target), 0 where the row is ignored."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * STEP + tl.arange(0, STEP)
    present = row < rows
    label = tl.load(labels + row, mask=present, other=0)
    kept = present & (label != ignore_index)
    slope = tl.load(factor) / tl.load(denominator)
    w = tl.load(weight + row, mask=kept, other=0.0) * slope if WEIGHTED else tl.where(kept, slope, 0.0)
    top = tl.load(normalizers + 2 * row, mask=kept, other=0.0)
    inverse = 1.0 / tl.load(normalizers + 2 * row + 1, mask=kept, other=1.0)
    inside = present[:, None] & (column < classes)[None, :]
    x = tl.load(logits + (row * stride)[:, None] + column[None, :], mask=inside & kept[:, None], other=0.0)
    softmax = tl.exp(x.to(tl.float32) - top[:, None]) * inverse[:, None]
    target = tl.where(column[None, :] == label[:, None], 1.0 - label_smoothing, 0.0) + label_smoothing / classes
    value = tl.where(kept[:, None], w[:, None] * (softmax - target), 0.0)
    tl.store(gradient + (row * classes)[:, None] + column[None, :], value, mask=inside)


def _rows(
    logits: Tensor, labels: Tensor, weight: Tensor | None, group: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The arguments as the kernels take them: the classes of a row side by side, the others contiguous."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    weight, group = (None if each is None else each.contiguous() for each in (weight, group))
    return logits, labels.contiguous(), weight, group


def forward(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    group: Tensor | None,
    groups: int,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, group_loss[G], group_hits int64[G], normalizers[N, 2], denominator) of logits[N, C]; others are float32.

    A label outside 0..C−1 or a group outside 0..G−1, in a row that is not ignored, makes the loss NaN: a GPU cannot
    raise without waiting.
    """
    logits, labels, weight, group = _rows(logits, labels, weight, group)
    rows, classes = logits.shape
    loss, denominator = logits.new_empty((), dtype=torch.float32), logits.new_empty((), dtype=torch.float32)
    group_loss, group_hits = logits.new_empty(groups, dtype=torch.float32), logits.new_empty(groups, dtype=torch.int64)
    losses, denominators = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    normalizers = logits.new_empty((rows, 2), dtype=torch.float32)
    hits = logits.new_empty(rows, dtype=torch.int8)
    tiles, sums_options = launches.chosen("cross_entropy", classes), launches.chosen("cross_entropy_sums").options()
    if rows:
        rows_kernel[(triton.cdiv(rows, tiles.blocks["TILE"]),)](
            logits,
            labels,
            losses if weight is None else weight,
            labels if group is None else group,
            normalizers,
            losses,
            denominators,
            hits,
            rows,
            classes,
            logits.stride(0),
            groups,
            label_smoothing,
            ignore_index,
            WEIGHTED=weight is not None,
            GROUPED=group is not None,
            SMOOTH=label_smoothing > 0,
            **tiles.options(),
        )
    chunks = max(1, triton.cdiv(rows, CHUNK.value))
    alone = chunks == 1
    sums = losses if alone else logits.new_empty((groups + 2, chunks), dtype=torch.float32)
    counts = hits if alone else logits.new_empty((groups, chunks), dtype=torch.int32)
    results = loss, denominator, group_loss, group_hits
    finish_kernel[(chunks * (groups + 1),)](
        losses,
        denominators,
        hits,
        labels if group is None else group,
        *results,
        sums,
        counts,
        rows,
        groups,
        GROUPED=group is not None,
        MEAN=mean,
        ALONE=alone,
        **sums_options,
    )
    if not alone:
        chunks_kernel[(groups + 1,)](sums, counts, *results, chunks, groups, MEAN=mean, **sums_options)
    return loss, group_loss, group_hits, normalizers, denominator


def backward(
    factor: Tensor,
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    normalizers: Tensor,
    denominator: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    """The gradient by the logits, in their dtype; ``factor`` is the outer gradient, a scalar on the device."""
    logits, labels, weight, _ = _rows(logits, labels, weight, None)
    rows, classes = logits.shape
    gradient = torch.empty((rows, classes), dtype=logits.dtype, device=logits.device)
    tiles = launches.chosen("cross_entropy", classes)
    if rows:
        gradient_kernel[(triton.cdiv(rows, tiles.blocks["TILE"]), triton.cdiv(classes, tiles.blocks["STEP"]))](
            factor.float(),
            logits,
            labels,
            normalizers if weight is None else weight,
            normalizers,
            denominator,
            gradient,
            rows,
            classes,
            logits.stride(0),
            label_smoothing,
            ignore_index,
            WEIGHTED=weight is not None,
            **tiles.options(),
        )
    return gradient
