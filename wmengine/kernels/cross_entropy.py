"""Cross entropy of task and trigger rows: one pass over the logits forward, one read and one write backward.

Forward, a program takes a tile of rows at once, or one long row by steps, the next ones on their way, with a running
maximum and sum of exponentials in each thread; of each row it keeps the two: their merger, the log-sum-exp, would lose
what a shift of all logits must not change. A row is a hit where no logit beats its label's: none is greater, none
before it is equal, and the sum is a number. A second kernel, for each group and once for all, adds the rows of a chunk
in a fixed order; a third adds the chunks where there are several, so that no program walks a million rows. Backward, a
program has a tile of rows and classes: every logit is read once, every gradient factor · w · (softmax − target) written
once.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

import math

import torch
import triton
import triton.language as tl

from wmengine.kernels import launches

Tensor = torch.Tensor

ROWS_STEP = tl.constexpr(4096)  # rows, or chunks of rows, that are added at a time
CHUNK = tl.constexpr(16384)  # rows that one program adds
STAGES = tl.constexpr(4)  # steps of a long row in flight


@triton.jit
def exponential(x, top):
    """exp(x − top), as the power of two that is one instruction: what is below 2⁻¹²⁶ is 0."""
    return tl.exp2((x - top) * 1.4426950408889634)


@triton.jit
def largest(x):
    """By row of x[steps, rows, width]: first within a thread, then across threads."""
    return tl.max(tl.max(x, axis=0), axis=1)


@triton.jit
def added(x):
    """By row of x[steps, rows, width]: first within a thread, then across threads."""
    return tl.sum(tl.sum(x, axis=0), axis=1)


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
    LONG: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Per row: top and Σ exp(x − top), weighted loss, weight (0 where ignored) and hit.

    A label outside 0..C−1 or a group outside 0..G−1 gives NaN. A row of several steps (LONG) is alone in its program,
    and each thread keeps a top and a sum of its own until the last step; such a row is not read where it is ignored.
    """
    classes, stride = classes // VECTOR * VECTOR, stride // VECTOR * VECTOR  # so much the compiler may rely on
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    label = tl.load(labels + row, mask=row < rows, other=0)
    kept = (row < rows) & (label != ignore_index)
    known = kept & (label >= 0) & (label < classes)
    if GROUPED:
        own = tl.load(group + row, mask=kept, other=0)
        known = known & (own >= 0) & (own < groups)
    chosen = tl.load(logits + row * stride + label, mask=known, other=float("nan")).to(tl.float32)
    # Steps are read as [parts · rows, width], which gives a row to as few warps as can be, and then taken apart.
    part = tl.arange(0, STEP // WIDTH * TILE)
    line = logits + (tl.program_id(0).to(tl.int64) * TILE + part % TILE) * stride
    column = (part // TILE * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    place = tl.reshape(column, (STEP // WIDTH, TILE, WIDTH))
    top = tl.full((TILE,), float("-inf"), tl.float32)
    before = top  # the largest logit of the steps before the label's
    exponentials = tl.zeros((TILE,), tl.float32)
    mean = tl.zeros((TILE,), tl.float32)  # Σ (x − top) / C, in halves, so that no difference overflows
    twice = 2.0 / classes
    first = 0
    inside = (tl.program_id(0) * TILE + part % TILE < rows)[:, None]
    if LONG:
        LANES: tl.constexpr = WIDTH // VECTOR
        first = (classes - 1) // STEP * STEP
        inside = inside & known[:, None]
        tops = tl.full((LANES,), float("-inf"), tl.float32)
        befores = tops
        sums = tl.zeros((LANES,), tl.float32)
        means = tl.zeros((LANES,), tl.float32)
        end = tl.max(tl.where(known, first, 0), axis=0)
        label_at = tl.max(tl.where(known, label, 0), axis=0).to(tl.int32)
        for begin in tl.range(0, end, STEP, num_stages=STAGES):
            x = tl.load(line[:, None] + (begin + column)).to(tl.float32)
            x = tl.reshape(x, (STEP // WIDTH, LANES, VECTOR))
            new_tops = tl.maximum(tops, tl.max(tl.max(x, axis=0), axis=1))
            befores = tl.where(begin + STEP <= label_at, new_tops, befores)
            shift = tl.where(new_tops == float("-inf"), 0.0, new_tops)
            e = exponential(x, shift[None, :, None])
            sums = sums * exponential(tops, shift) + tl.sum(tl.sum(e, axis=0), axis=1)
            if SMOOTH:
                risen = tl.where(tops == float("-inf"), 0.0, 0.5 * tops - 0.5 * shift)
                below = (0.5 * x - 0.5 * shift[None, :, None]) * twice
                means += risen * (begin // LANES * twice) + tl.sum(tl.sum(below, axis=0), axis=1)
            tops = new_tops
        top = tl.maximum(top, tl.max(tops, axis=0))
        before = tl.maximum(before, tl.max(befores, axis=0))
        shift = tl.max(tl.where(top == float("-inf"), 0.0, top), axis=0)
        exponentials += tl.sum(sums * exponential(tops, shift), axis=0)
        if SMOOTH:
            risen = tl.where(tops == float("-inf"), 0.0, 0.5 * tops - 0.5 * shift)
            mean += tl.sum(risen * (end // LANES * twice) + means, axis=0)
    inside = inside & (first + column < classes)
    x = tl.load(line[:, None] + (first + column), mask=inside, other=float("-inf")).to(tl.float32)
    x, inside = tl.reshape(x, (STEP // WIDTH, TILE, WIDTH)), tl.reshape(inside, (STEP // WIDTH, TILE, WIDTH))
    new_top = tl.maximum(top, largest(x))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    exponentials = exponentials * exponential(top, shift) + added(exponential(x, shift[None, :, None]))
    if SMOOTH:
        risen = tl.where(top == float("-inf"), 0.0, 0.5 * top - 0.5 * shift)
        below = tl.where(inside, (0.5 * x - 0.5 * shift[None, :, None]) * twice, 0.0)
        mean += risen * (first * twice) + added(below)
    if LONG:  # the step of the label once more
        begin = label_at // STEP * STEP
        inside = known[:, None] & (begin + column < classes)
        x = tl.load(line[:, None] + (begin + column), mask=inside, other=float("-inf")).to(tl.float32)
        x, label = tl.reshape(x, (STEP // WIDTH, TILE, WIDTH)), label - begin
    at = tl.where(x == new_top[None, :, None], place, STEP)
    logarithm = tl.log(exponentials)
    top = tl.where(known & (new_top != float("-inf")), new_top, float("nan"))
    hit = (logarithm == logarithm) & (before < top) & (tl.min(tl.min(at, axis=0), axis=1) == label)
    loss = logarithm + (top - chosen)
    if SMOOTH:  # both parts are at least 0: neither takes from the other
        loss = (1.0 - label_smoothing) * loss + label_smoothing * (logarithm - mean)
    w = tl.where(kept, tl.load(weight + row, mask=kept, other=0.0), 0.0) if WEIGHTED else tl.where(kept, 1.0, 0.0)
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
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """gradient[rows, classes] = factor / denominator · w · (softmax − target), 0 where the row is ignored.

    Programs begin with the logits that the forward pass read last: they may still be in the cache.
    """
    classes, stride = classes // VECTOR * VECTOR, stride // VECTOR * VECTOR  # so much the compiler may rely on
    program, tiles = tl.num_programs(0) - 1 - tl.program_id(0), tl.cdiv(classes, STEP)
    row = (program // tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = program % tiles * STEP + tl.arange(0, STEP)
    present = row < rows
    label = tl.load(labels + row, mask=present, other=0)
    kept = present & (label != ignore_index)
    slope = tl.load(factor) / tl.load(denominator)
    w = tl.where(kept, tl.load(weight + row, mask=kept, other=0.0) * slope if WEIGHTED else slope, 0.0)
    top = tl.load(normalizers + 2 * row, mask=kept, other=0.0)
    scaled = w / tl.load(normalizers + 2 * row + 1, mask=kept, other=1.0)
    inside = present[:, None] & (column < classes)[None, :]
    x = tl.load(logits + (row * stride)[:, None] + column[None, :], mask=inside & kept[:, None], other=0.0)
    value = exponential(x.to(tl.float32), top[:, None]) * scaled[:, None] - (w * (label_smoothing / classes))[:, None]
    own = column[None, :] == label.to(tl.int32)[:, None]  # a label that is no int32 has top NaN
    value = tl.where(own, value - (w * (1.0 - label_smoothing))[:, None], value)
    tl.store(gradient + (row * classes)[:, None] + column[None, :], value, mask=inside)


def _rows(
    logits: Tensor, labels: Tensor, weight: Tensor | None, group: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The arguments as the kernels take them: the classes of a row side by side, the others contiguous."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    weight, group = (None if each is None else each.contiguous() for each in (weight, group))
    return logits, labels.contiguous(), weight, group


def _vector(logits: Tensor) -> int:
    """How many logits side by side the GPU reads at once: 16 bytes of them, where every row begins and ends so."""
    size = logits.element_size()
    return math.gcd(16 // size, logits.data_ptr() // size, *logits.shape[1:], logits.stride(0))


def row_blocks(tiles: launches.Launch, classes: int, vector: int) -> dict[str, int]:
    """How the rows kernel takes a step apart: WIDTH logits are what a row's threads read at once, VECTOR each."""
    step = tiles.blocks["STEP"]
    width = min(step, 32 * tiles.warps // tiles.blocks["TILE"] * vector)
    return {"LONG": classes > step, "VECTOR": vector, "WIDTH": width}


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
            **row_blocks(tiles, classes, _vector(logits)),
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
        gradient_kernel[(triton.cdiv(rows, tiles.blocks["TILE"]) * triton.cdiv(classes, tiles.blocks["STEP"]),)](
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
            VECTOR=_vector(logits),
            **tiles.options(),
        )
    return gradient
