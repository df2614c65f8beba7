"""Carriers: inverse norms of filters and means over filters forward, gradients of whole filters backward.

The gradient of a unit filter u = w/‖w‖ is (d − u·⟨u, d⟩)/‖w‖ with d the loss's derivative by u: a filter's dot product
comes first, so a program walks its filters twice, the second time from the cache.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

import triton
import triton.language as tl

from wmengine.kernels.layers import (
    BLOCK,
    COLUMN_TILE,
    COLUMNS,
    FILTER_TILE,
    FILTERS,
    FIRST_BLOCK,
    FIRST_COLUMN_TILE,
    FIRST_FILTER,
    FIRST_FILTER_TILE,
    FIRST_VALUE,
    field,
    find_layer,
)
from wmengine.kernels.philox import flip

FILTER_STEP = tl.constexpr(512)  # weights of each filter that a program of the norms takes at a time
COLUMN_STEP = tl.constexpr(64)  # filters of each column that a program takes at a time
CHUNK = tl.constexpr(512)  # values, of which a lane of a filter's gradient has every 32nd:
STEPS = tl.constexpr(16)  # so many
LANES = tl.constexpr(128)  # of all filters of a tile

FROM_SKETCH = tl.constexpr(0)  # where a filter's d comes from: signs and buckets,
FROM_VALUES = tl.constexpr(1)  # one stored number a weight,
FROM_MEANS = tl.constexpr(2)  # or one stored number a column


# (1 / the largest float32)²: the square of the smallest norm whose inverse float32 can hold.
SMALLEST_SQUARE = tl.constexpr(8.636169584606055e-78)


@triton.jit
def inverse_norms_kernel(pointers, table, norms, LAYERS: tl.constexpr, DTYPE: tl.constexpr):
    """norms[filters of all layers] = 1/‖filter‖, 0 for a zero filter.

    Squares are added in float64, so that a filter scaled by 1e30 or 1e-30 keeps its direction.
    """
    layer, tile = find_layer(table, FIRST_FILTER_TILE, tl.program_id(0).to(tl.int64), LAYERS)
    filters = field(table, FILTERS, layer, LAYERS)
    columns = field(table, COLUMNS, layer, LAYERS)
    base = tl.load(pointers + layer).to(tl.pointer_type(DTYPE))
    row = tile * FILTER_TILE + tl.arange(0, FILTER_TILE)
    column = tl.arange(0, FILTER_STEP)
    squares = tl.zeros((FILTER_TILE, FILTER_STEP), tl.float64)
    for first in range(0, columns, FILTER_STEP):
        inside = (row < filters)[:, None] & (first + column < columns)[None, :]
        w = tl.load(base + row[:, None] * columns + (first + column)[None, :], mask=inside, other=0.0)
        w = w.to(tl.float32).to(tl.float64)
        squares += w * w
    square = tl.sum(squares, axis=1)
    # Zero where float32 cannot hold the inverse; a NaN filter compares false and must stay NaN.
    zero = square <= SMALLEST_SQUARE
    inverse = tl.where(zero, 0.0, 1.0 / tl.sqrt(tl.where(zero, 1.0, square)))
    tl.store(norms + field(table, FIRST_FILTER, layer, LAYERS) + row, inverse.to(tl.float32), mask=row < filters)


@triton.jit
def column_means_kernel(pointers, table, norms, values, LAYERS: tl.constexpr, DTYPE: tl.constexpr, UNIT: tl.constexpr):
    """values[columns of all layers] = mean over the filters, each over its norm where UNIT."""
    layer, tile = find_layer(table, FIRST_COLUMN_TILE, tl.program_id(0).to(tl.int64), LAYERS)
    filters = field(table, FILTERS, layer, LAYERS)
    columns = field(table, COLUMNS, layer, LAYERS)
    layer_norms = norms + field(table, FIRST_FILTER, layer, LAYERS)
    base = tl.load(pointers + layer).to(tl.pointer_type(DTYPE))
    column = tile * COLUMN_TILE + tl.arange(0, COLUMN_TILE)
    step = tl.arange(0, COLUMN_STEP)
    sums = tl.zeros((COLUMN_STEP, COLUMN_TILE), tl.float32)
    for first in range(0, filters, COLUMN_STEP):
        row = first + step
        inside = (row < filters)[:, None] & (column < columns)[None, :]
        w = tl.load(base + row[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if UNIT:
            w = w * tl.load(layer_norms + row, mask=row < filters, other=0.0)[:, None]
        sums += w
    mean = tl.sum(sums, axis=0) / filters.to(tl.float32)
    tl.store(values + field(table, FIRST_VALUE, layer, LAYERS) + column, mean, mask=column < columns)


@triton.jit
def direction(
    values, residual, words, offsets, begin, end, first, place, inside, BUCKETS: tl.constexpr, SOURCE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """d[steps, lanes] of one chunk, unscaled: the derivative by the value that each weight gives to the carrier."""
    other: tl.constexpr = None if WHOLE else 0.0
    if SOURCE == FROM_SKETCH:
        RUNS: tl.constexpr = CHUNK // BUCKETS if BUCKETS < CHUNK else 1
        SPAN: tl.constexpr = BUCKETS if BUCKETS < BLOCK else BLOCK
        lane = tl.arange(0, LANES) % 32
        m = begin + first
        chunk = (m - lane).to(tl.uint64)  # quotients and remainders are then shifts and masks
        if not WHOLE:
            chunk = tl.where(m < end, chunk, 0)  # past a filter's end nothing is asked for, and any signs will do
        word = tl.load(words + chunk // 1024 * 32 + lane).to(tl.uint32, bitcast=True)
        # Loads of one axis, so that a warp's are of 32 neighbours.
        run = tl.reshape((chunk // SPAN)[None, :] + tl.arange(0, RUNS)[:, None], (RUNS * LANES,))
        offset = tl.reshape(tl.load(offsets + run), (RUNS, 1, LANES))
        bucket = (m.to(tl.int32)[None, None, :] ^ offset) & (BUCKETS - 1)  # of a run's first step, and then of each
        bucket = tl.reshape(bucket ^ (tl.arange(0, STEPS // RUNS) * 32)[None, :, None], (STEPS * LANES,))
        d = tl.reshape(tl.load(residual + bucket), (STEPS, LANES))
        d = flip(d, (word >> (chunk // 32 % 32).to(tl.uint32))[None, :], tl.arange(0, STEPS)[:, None])
    elif SOURCE == FROM_VALUES:
        d = tl.load(values + (begin + first)[None, :] + tl.arange(0, STEPS)[:, None] * 32, mask=inside, other=other)
    else:
        d = tl.load(values + first + place, mask=inside, other=other)
    return d


@triton.jit
def within(first, place, columns):
    """Whether 0 ≤ first + place < columns, for place > −CHUNK: one comparison of two numbers without a sign."""
    ahead = tl.minimum(first, CHUNK)
    end = tl.maximum(tl.minimum(columns - first, 1 << 30) + ahead, 0)
    return (place + ahead.to(tl.int32)).to(tl.uint32) < end.to(tl.uint32)


@triton.jit
def tile_gradients(
    base, target, values, residual, words, offsets, norms, slope, row, filters, columns, BUCKETS: tl.constexpr,
    UNIT: tl.constexpr, SOURCE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Gradients of the filters that the lanes' rows name; WHOLE where all of them exist and consist of whole chunks."""
    other: tl.constexpr = None if WHOLE else 0.0
    lane = tl.arange(0, LANES) % 32
    skipped = (row * columns % CHUNK).to(tl.int32)
    begin, end = row * columns - skipped + lane, tl.where(row < filters, (row + 1) * columns, 0)
    step = (tl.arange(0, STEPS) * 32)[:, None]
    place = step + (lane - skipped)[None, :]
    walked = columns + tl.max(skipped, axis=0)
    present = tl.where(row < filters, columns, 0)[None, :]
    if UNIT:
        inverse = tl.load(norms + row, mask=row < filters, other=0.0)
        dots = tl.zeros((STEPS, LANES), tl.float32)
        for first in range(0, walked, CHUNK):
            inside = None if WHOLE else within(first, place, present)
            w = tl.load(base + (begin + first)[None, :] + step, mask=inside, other=other).to(tl.float32)
            d = direction(
                values, residual, words, offsets, begin, end, first, place, inside, BUCKETS, SOURCE, WHOLE
            )  # fmt: skip
            product = w * inverse[None, :] * d
            dots += product if WHOLE else tl.where(inside, product, 0.0)
        dot = tl.sum(tl.reshape(tl.sum(dots, axis=0), (FILTER_TILE, 32)), axis=1)
        dot = tl.reshape(tl.broadcast_to(dot[:, None], (FILTER_TILE, 32)), (LANES,))
    for first in range(0, walked, CHUNK):
        inside = None if WHOLE else within(first, place, present)
        g = direction(values, residual, words, offsets, begin, end, first, place, inside, BUCKETS, SOURCE, WHOLE)
        if UNIT:
            w = tl.load(base + (begin + first)[None, :] + step, mask=inside, other=other).to(tl.float32)
            g = inverse[None, :] * (slope * (g - w * inverse[None, :] * dot[None, :]))
        else:
            g = slope * g
        tl.store(target + (begin + first)[None, :] + step, g, mask=inside)


@triton.jit
def filter_gradients_kernel(
    factor,
    scale,
    residual,
    pointers,
    outputs,
    table,
    norms,
    values,
    words,
    offsets,
    BUCKETS: tl.constexpr,
    LAYERS: tl.constexpr,
    DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    SOURCE: tl.constexpr,
):
    """Gradients of a tile of filters: d, or for unit filters (d − u⟨u, d⟩)/‖w‖, at the layers' ``outputs``.

    A filter has 32 lanes, which walk the chunks of the layer's values that hold it: a lane's values in a chunk are 32
    apart and have their signs in one word.
    """
    item = tl.num_programs(0) - 1 - tl.program_id(0)  # first what the forward pass read last: it may be in the cache
    layer, tile = find_layer(table, FIRST_FILTER_TILE, item.to(tl.int64), LAYERS)
    filters = field(table, FILTERS, layer, LAYERS)
    columns = field(table, COLUMNS, layer, LAYERS)
    first_block = field(table, FIRST_BLOCK, layer, LAYERS)
    base = tl.load(pointers + layer).to(tl.pointer_type(DTYPE))
    values += field(table, FIRST_VALUE, layer, LAYERS)
    words += first_block * 128
    offsets += first_block * (BLOCK // BUCKETS if BUCKETS < BLOCK else 1)
    target = tl.load(outputs + layer).to(tl.pointer_type(DTYPE))
    slope = 1.0
    if SOURCE == FROM_SKETCH:
        slope = tl.load(factor) * scale
    if SOURCE == FROM_MEANS:
        slope = 1.0 / filters.to(tl.float32)
    norms += field(table, FIRST_FILTER, layer, LAYERS)
    row = tile * FILTER_TILE + tl.arange(0, LANES) // 32
    if (columns % CHUNK == 0) & ((tile + 1) * FILTER_TILE <= filters):
        tile_gradients(
            base, target, values, residual, words, offsets, norms, slope, row, filters, columns,
            BUCKETS, UNIT, SOURCE, True,
        )  # fmt: skip
    else:
        tile_gradients(
            base, target, values, residual, words, offsets, norms, slope, row, filters, columns,
            BUCKETS, UNIT, SOURCE, False,
        )  # fmt: skip
