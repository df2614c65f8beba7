"""Cross entropy of task and trigger rows, their hits, and the gradient by the logits.

First the weights of all rows are added, by which the loss is divided. Forward, a program takes a tile of rows at once,
or one long row by steps, the next ones on their way, with a running maximum and sum of exponentials in each thread; of
each row it keeps the two: their merger, the log-sum-exp, would lose what a shift of all logits must not change. A row
is a hit where no logit beats its label's: none is greater, none before it is equal, and the sum is a number. Where the
gradient w · (softmax − target) is wanted, the program reads its rows again, which may still be in the cache, and writes
it; backward has nothing to do then but to look whether the outer gradient is 1. Else backward reads every logit once
more: wmengine/ops/torch_cross_entropy.py says when. Another kernel, for each group and once for all, adds the losses of
a chunk of rows in a fixed order; a last one adds the chunks where there are several, so that no program walks a million
rows.
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
def gradient_of(x, top, scaled, w, own, label_smoothing, classes):
    """w · (softmax − target) of logits, with scaled = w / Σ exp(x − top), and `own` where x is the label's."""
    value = exponential(x, top) * scaled - w * (label_smoothing / classes)
    return tl.where(own, value - w * (1.0 - label_smoothing), value)


@triton.jit
def by_part(values, PARTS: tl.constexpr, TILE: tl.constexpr):
    """values[rows] for each row of [parts · rows, width]."""
    return tl.reshape(tl.broadcast_to(values[None, :], (PARTS, TILE)), (PARTS * TILE,))


@triton.jit
def weights_kernel(labels, weight, sums, rows, ignore_index, LABELLED: tl.constexpr, WEIGHTED: tl.constexpr):
    """sums[chunk] = Σ weight of the chunk's rows that are not ignored."""
    begin = tl.program_id(0).to(tl.int64) * CHUNK
    step = tl.arange(0, ROWS_STEP)
    weights = tl.zeros((ROWS_STEP,), tl.float32)
    for first in range(begin, tl.minimum(begin + CHUNK, rows), ROWS_STEP):
        kept = first + step < rows
        if LABELLED:
            kept = kept & (tl.load(labels + first + step, mask=kept, other=ignore_index) != ignore_index)
        weights += tl.load(weight + first + step, mask=kept, other=0.0) if WEIGHTED else tl.where(kept, 1.0, 0.0)
    tl.store(sums + tl.program_id(0), tl.sum(weights, axis=0))


@triton.jit
def rows_kernel(
    logits,
    labels,
    weight,
    group,
    denominator,
    normalizers,
    losses,
    hits,
    gradient,
    rows,
    classes,
    stride,
    groups,
    label_smoothing,
    ignore_index,
    WEIGHTED: tl.constexpr,
    GROUPED: tl.constexpr,
    SMOOTH: tl.constexpr,
    GRADIENT: tl.constexpr,
    LONG: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Per row: top and Σ exp(x − top), or the gradient by its logits; weighted loss, and hit.

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
    present = (tl.program_id(0).to(tl.int64) * TILE + part % TILE < rows)[:, None]
    inside = present
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
        x, first = tl.reshape(x, (STEP // WIDTH, TILE, WIDTH)), begin
    at = tl.where(x == new_top[None, :, None], place, STEP)
    logarithm = tl.log(exponentials)
    top = tl.where(known & (new_top != float("-inf")), new_top, float("nan"))
    hit = (logarithm == logarithm) & (before < top) & (tl.min(tl.min(at, axis=0), axis=1) == label - first)
    loss = logarithm + (top - chosen)
    if SMOOTH:  # both parts are at least 0: neither takes from the other
        loss = (1.0 - label_smoothing) * loss + label_smoothing * (logarithm - mean)
    w = tl.where(kept, tl.load(weight + row, mask=kept, other=0.0), 0.0) if WEIGHTED else tl.where(kept, 1.0, 0.0)
    tl.store(losses + row, tl.where(kept, w * loss, 0.0), mask=row < rows)
    tl.store(hits + row, hit.to(tl.int8), mask=row < rows)
    if GRADIENT:
        PARTS: tl.constexpr = STEP // WIDTH
        w = tl.where(kept, w * (1.0 / tl.load(denominator)), 0.0)
        scaled = by_part(w / tl.where(kept, exponentials, 1.0), PARTS, TILE)[:, None]
        top, w = by_part(tl.where(kept, top, 0.0), PARTS, TILE)[:, None], by_part(w, PARTS, TILE)[:, None]
        own = by_part(label.to(tl.int32), PARTS, TILE)[:, None]  # a label that is no int32 has top NaN
        read = by_part(kept, PARTS, TILE)[:, None]
        target = gradient + (tl.program_id(0).to(tl.int64) * TILE + part % TILE) * classes
        for back in range(0, classes, STEP):  # what was read last is the likeliest to be there
            at_once = (classes - 1) // STEP * STEP - back + column
            here = present & (at_once < classes)
            again = tl.load(line[:, None] + at_once, mask=here & read, other=0.0, eviction_policy="evict_first")
            value = gradient_of(again.to(tl.float32), top, scaled, w, at_once == own, label_smoothing, classes)
            tl.store(target[:, None] + at_once, value, mask=here, eviction_policy="evict_first")
    else:
        tl.store(normalizers + 2 * row, top, mask=row < rows)
        tl.store(normalizers + 2 * row + 1, exponentials, mask=row < rows)


@triton.jit
def finish_kernel(
    losses,
    hits,
    group,
    denominator,
    loss,
    group_loss,
    group_hits,
    sums,
    counts,
    rows,
    groups,
    GROUPED: tl.constexpr,
    ALONE: tl.constexpr,
):
    """Of each chunk, program g < groups adds its group's losses and hits, program ``groups`` all losses.

    They are the results where there is one chunk (ALONE), else sums[groups + 1, chunks] and counts[groups, chunks].
    """
    chunk, own = tl.program_id(0) // (groups + 1), tl.program_id(0) % (groups + 1)
    chunks = tl.num_programs(0) // (groups + 1)  # all on one axis: the others take 65535 programs
    begin = chunk.to(tl.int64) * CHUNK
    end = tl.minimum(begin + CHUNK, rows)
    step = tl.arange(0, ROWS_STEP)
    total = tl.zeros((ROWS_STEP,), tl.float32)
    count = tl.zeros((ROWS_STEP,), tl.int32)
    for first in range(begin, end, ROWS_STEP):
        row = first + step
        member = row < end
        if own < groups:
            member = member & (tl.load(group + row, mask=member, other=-1) == own if GROUPED else own == 0)
            count += tl.load(hits + row, mask=member, other=0).to(tl.int32)
        total += tl.load(losses + row, mask=member, other=0.0)
    added_up, counted = tl.sum(total, axis=0), tl.sum(count, axis=0)
    if ALONE:
        if own < groups:
            tl.store(group_loss + own, added_up)
            tl.store(group_hits + own, counted.to(tl.int64))
        else:
            tl.store(loss, added_up / tl.load(denominator))
    else:
        tl.store(sums + own * chunks + chunk, added_up)
        if own < groups:
            tl.store(counts + own * chunks + chunk, counted)


@triton.jit
def chunks_kernel(sums, counts, denominator, loss, group_loss, group_hits, chunks, groups):
    """Program g < groups adds the chunks of its group, program ``groups`` those of the loss."""
    own = tl.program_id(0)
    step = tl.arange(0, ROWS_STEP)
    total = tl.zeros((ROWS_STEP,), tl.float32)
    count = tl.zeros((ROWS_STEP,), tl.int64)
    for first in range(0, chunks, ROWS_STEP):
        chunk = first + step
        total += tl.load(sums + own * chunks + chunk, mask=chunk < chunks, other=0.0)
        if own < groups:
            count += tl.load(counts + own * chunks + chunk, mask=chunk < chunks, other=0).to(tl.int64)
    added_up = tl.sum(total, axis=0)
    if own < groups:
        tl.store(group_loss + own, added_up)
        tl.store(group_hits + own, tl.sum(count, axis=0))
    else:
        tl.store(loss, added_up / tl.load(denominator))


@triton.jit
def scale_kernel(gradient, factor, count, BLOCK: tl.constexpr):
    """gradient[count] times the factor, which is read on the device and is hardly ever anything but 1."""
    by = tl.load(factor)
    if by != 1.0:
        for first in range(tl.program_id(0).to(tl.int64) * BLOCK, count, tl.num_programs(0).to(tl.int64) * BLOCK):
            at = first + tl.arange(0, BLOCK)
            value = tl.load(gradient + at, mask=at < count, other=0.0).to(tl.float32)
            tl.store(gradient + at, value * by, mask=at < count)


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
    own = column[None, :] == label.to(tl.int32)[:, None]  # a label that is no int32 has top NaN
    value = gradient_of(x.to(tl.float32), top[:, None], scaled[:, None], w[:, None], own, label_smoothing, classes)
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


def _denominator(labels: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Σ weight of the rows that are not ignored, float32[1]."""
    sums, labelled = labels if weight is None else weight, True
    while labelled or len(sums) > 1:
        target = torch.empty(max(1, triton.cdiv(len(sums), CHUNK.value)), dtype=torch.float32, device=labels.device)
        weights_kernel[(len(target),)](
            labels,
            sums,
            target,
            len(sums),
            ignore_index,
            LABELLED=labelled,
            WEIGHTED=weight is not None or not labelled,
            **launches.chosen("cross_entropy_sums").options(),
        )
        sums, labelled = target, False
    return sums


def forward(
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
    """(loss, group_loss[G], group_hits int64[G], kept, denominator) of logits[N, C]; kept is the gradient by the
    logits, in their dtype, or, without one, what `backward` needs, normalizers[N, 2]; others are float32.

    A label outside 0..C−1 or a group outside 0..G−1, in a row that is not ignored, makes the loss NaN: a GPU cannot
    raise without waiting.
    """
    logits, labels, weight, group = _rows(logits, labels, weight, group)
    rows, classes = logits.shape
    loss, losses = logits.new_empty((), dtype=torch.float32), logits.new_empty(rows, dtype=torch.float32)
    group_loss, group_hits = logits.new_empty(groups, dtype=torch.float32), logits.new_empty(groups, dtype=torch.int64)
    hits = logits.new_empty(rows, dtype=torch.int8)
    if with_gradient:
        kept = torch.empty((rows, classes), dtype=logits.dtype, device=logits.device)
    else:
        kept = logits.new_empty((rows, 2), dtype=torch.float32)
    denominator = _denominator(labels, weight, ignore_index)[0] if mean else logits.new_ones((), dtype=torch.float32)
    tiles, sums_options = launches.chosen("cross_entropy", classes), launches.chosen("cross_entropy_sums").options()
    if rows:
        rows_kernel[(triton.cdiv(rows, tiles.blocks["TILE"]),)](
            logits,
            labels,
            losses if weight is None else weight,
            labels if group is None else group,
            denominator,
            losses if with_gradient else kept,
            losses,
            hits,
            kept if with_gradient else logits,
            rows,
            classes,
            logits.stride(0),
            groups,
            label_smoothing,
            ignore_index,
            WEIGHTED=weight is not None,
            GROUPED=group is not None,
            SMOOTH=label_smoothing > 0,
            GRADIENT=with_gradient,
            **row_blocks(tiles, classes, _vector(logits)),
            **tiles.options(),
        )
    chunks = max(1, triton.cdiv(rows, CHUNK.value))
    alone = chunks == 1
    sums = losses if alone else logits.new_empty((groups + 1, chunks), dtype=torch.float32)
    counts = hits if alone else logits.new_empty((groups, chunks), dtype=torch.int32)
    results = denominator, loss, group_loss, group_hits
    finish_kernel[(chunks * (groups + 1),)](
        losses,
        hits,
        labels if group is None else group,
        *results,
        sums,
        counts,
        rows,
        groups,
        GROUPED=group is not None,
        ALONE=alone,
        **sums_options,
    )
    if not alone:
        chunks_kernel[(groups + 1,)](sums, counts, *results, chunks, groups, **sums_options)
    return loss, group_loss, group_hits, kept, denominator


def scale(gradient: Tensor, factor: Tensor) -> None:
    """The gradient that `forward` kept times the outer one, a scalar on the device, in place; costs nothing where that
    is 1."""
    options = launches.chosen("cross_entropy_scale").options()
    count = gradient.numel()
    if count:
        programs = min(triton.cdiv(count, options["BLOCK"]), 132 * 8)
        scale_kernel[(programs,)](gradient, factor.float(), count, **options)


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
