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

FILTER_STEP = tl.constexpr(256)  # weights of each filter that a program takes at a time
COLUMN_STEP = tl.constexpr(64)  # filters of each column that a program takes at a time

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
    values, residual, words, offsets, slope, row, column, columns, inside, filters, total, BUCKETS: tl.constexpr,
    SOURCE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """d for a tile of filters: the loss's derivative by the value that each weight gives to the carrier."""
    if SOURCE == FROM_SKETCH:
        SPAN: tl.constexpr = BUCKETS if BUCKETS < BLOCK else BLOCK
        # uint32 where that holds m: quotients and remainders are then shifts and masks. Blocks are few: int32 does.
        m = row.to(INDEX)[:, None] * columns.to(INDEX) + column.to(INDEX)[None, :]
        word = tl.load(words + ((m // 1024) * 32 + m % 32).to(tl.int32), mask=inside, other=0)
        offset = tl.load(offsets + (m // SPAN).to(tl.int32), mask=inside, other=0)
        bucket = (m & (BUCKETS - 1)).to(tl.int32) ^ offset
        d = tl.load(residual + bucket, mask=inside & (bucket < total), other=0.0) * slope
        d = flip(d, word.to(tl.uint32, bitcast=True), (m // 32) % 32)
    elif SOURCE == FROM_VALUES:
        d = tl.load(values + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
    else:
        d = tl.load(values + column, mask=column < columns, other=0.0)[None, :] / filters.to(tl.float32)
        d = tl.where(inside, d, 0.0)
    return d


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
    total,
    BUCKETS: tl.constexpr,
    LAYERS: tl.constexpr,
    DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    SOURCE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Gradients of a tile of filters: d, or for unit filters (d − u⟨u, d⟩)/‖w‖, at the layers' ``outputs``."""
    SPAN: tl.constexpr = BUCKETS if BUCKETS < BLOCK else BLOCK
    layer, tile = find_layer(table, FIRST_FILTER_TILE, tl.program_id(0).to(tl.int64), LAYERS)
    filters = field(table, FILTERS, layer, LAYERS)
    columns = field(table, COLUMNS, layer, LAYERS)
    first_block = field(table, FIRST_BLOCK, layer, LAYERS)
    slope = tl.load(factor) * scale
    base = tl.load(pointers + layer).to(tl.pointer_type(DTYPE))
    own_values = values + field(table, FIRST_VALUE, layer, LAYERS)
    own_words = words + first_block * 128
    own_offsets = offsets + first_block * (BLOCK // SPAN)
    target = tl.load(outputs + layer).to(tl.pointer_type(DTYPE))
    row = tile * FILTER_TILE + tl.arange(0, FILTER_TILE)
    step = tl.arange(0, FILTER_STEP)
    if UNIT:
        inverse = tl.load(norms + field(table, FIRST_FILTER, layer, LAYERS) + row, mask=row < filters, other=0.0)
        dots = tl.zeros((FILTER_TILE, FILTER_STEP), tl.float32)
        for first in range(0, columns, FILTER_STEP):
            column = first + step
            inside = (row < filters)[:, None] & (column < columns)[None, :]
            w = tl.load(base + row[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
            d = direction(
                own_values, residual, own_words, own_offsets, slope, row, column, columns, inside, filters, total,
                BUCKETS, SOURCE, INDEX,
            )  # fmt: skip
            dots += w * inverse[:, None] * d
        dot = tl.sum(dots, axis=1)
    for first in range(0, columns, FILTER_STEP):
        column = first + step
        inside = (row < filters)[:, None] & (column < columns)[None, :]
        at = row[:, None] * columns + column[None, :]
        g = direction(
            own_values, residual, own_words, own_offsets, slope, row, column, columns, inside, filters, total,
            BUCKETS, SOURCE, INDEX,
        )  # fmt: skip
        if UNIT:
            w = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
            g = inverse[:, None] * (g - w * inverse[:, None] * dot[:, None])
        tl.store(target + at, g, mask=inside)
