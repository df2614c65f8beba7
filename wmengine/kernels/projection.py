"""Keyed projections of many layers in one launch: signs and buckets, partial sums, and the adjoint.

A sketch needs one Philox counter for 128 weights, but a Triton program cannot keep a counter's words in the lane that
drew them. So one small kernel writes the sign words and the bucket offsets r XOR e of every layer first (1/32 of the
weights' size and a little), and what follows reads them from the cache. Dense rows are drawn where they are used.

Accumulators belong to destination buckets: bucket(m) = (m mod P) XOR x with x = r XOR e, an XOR is its own inverse, and
so bucket d of a run is fed by weight d XOR x of that run.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

import triton
import triton.language as tl

from wmengine.kernels.layers import (
    BLOCK,
    COLUMNS,
    COUNT,
    FIRST_BLOCK,
    FIRST_FILTER,
    FIRST_GROUP,
    GAUSSIAN_UNIT,
    GROUPS,
    KEY,
    RADEMACHER,
    SKETCH,
    field,
    find_layer,
    layer_values,
)
from wmengine.kernels.philox import (
    DOMAIN_DENSE,
    DOMAIN_RUN,
    DOMAIN_SKETCH,
    DOMAIN_SWAP,
    flip,
    normal_values,
    philox4x32,
)

DENSE_TILE = tl.constexpr(32)  # rows of a dense matrix that one program meets


@triton.jit
def load_values(base, norms, first, at, count, columns, UNIT: tl.constexpr, WHOLE: tl.constexpr = False):
    """float32 values ``first + at`` of a layer; over their filters' norms if UNIT; 0 past its end unless all are WHOLE.

    ``at`` is int32 and below 4096. So a filter that is longer may as well begin 4096 before its end, and below 8192 the
    quotient x // span is ⌊(x + 1) · ⌊(2³² − 1) / span⌋ / 2³²⌋.
    """
    inside = at < (BLOCK if WHOLE else tl.minimum(count - first, BLOCK).to(tl.int32))
    values = tl.load(base + first + at, mask=None if WHOLE else inside, other=None if WHOLE else 0.0).to(tl.float32)
    if UNIT:
        row = first // columns
        span = tl.minimum(columns, BLOCK)
        rest = tl.maximum(first - row * columns - (columns - span), 0).to(tl.uint32)
        rows = tl.umulhi(at.to(tl.uint32) + (rest + 1), 0xFFFF_FFFF // span.to(tl.uint32)).to(tl.int32)
        # Of one axis: Triton 3.6 would otherwise spread a warp over the axis that it thinks of first.
        own = norms + row + tl.reshape(rows, (at.numel,))
        inverses = tl.load(own) if WHOLE else tl.load(own, mask=tl.reshape(inside, (at.numel,)), other=0.0)
        values = values * tl.reshape(inverses, at.shape)
    return values


@triton.jit
def signed_values(
    base, norms, words, offsets, block, count, columns, BUCKETS: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr
):
    """One block's signed values [4, 4, 256], slot after slot of its runs of buckets.

    Gathers are of one axis, so that a warp's are 32 neighbours. A word has the signs of slots 32 apart, of which a
    thread has 4.
    """
    TILE: tl.constexpr = BUCKETS if BUCKETS < BLOCK else BLOCK
    RUNS: tl.constexpr = BLOCK // TILE
    slot = tl.arange(0, BLOCK)
    quarter = tl.arange(0, 1024)
    quarter = quarter // 256 * 1024 + quarter % 256
    known = tl.where(block * BLOCK < count, block, 0)  # a block that is none has no values, whatever their signs
    offsets += known * RUNS
    at = slot ^ (tl.load(offsets + (slot // TILE if RUNS > 1 else 0)) & (TILE - 1))
    word_at = quarter ^ (tl.load(offsets + (quarter // TILE if RUNS > 1 else 0)) & (TILE - 1))
    word = tl.load(words + known * 128 + word_at // 1024 * 32 + word_at % 32)
    values = load_values(base, norms, block * BLOCK, at, count, columns, UNIT, WHOLE)
    values, bit = tl.reshape(values, (4, 4, 256)), tl.reshape(at // 32 % 32, (4, 4, 256))
    return flip(values, tl.reshape(word, (4, 1, 256)).to(tl.uint32, bitcast=True), bit)


@triton.jit
def sketch_tables_kernel(table, words, offsets, BUCKETS: tl.constexpr, LAYERS: tl.constexpr):
    """words int32[blocks, 4, 32] of signs, and offsets r XOR e int32[blocks, runs in a block]; one program a block."""
    RUNS: tl.constexpr = BLOCK // BUCKETS if BUCKETS < BLOCK else 1
    item = tl.program_id(0).to(tl.int64)
    layer, block = find_layer(table, FIRST_BLOCK, item, LAYERS)
    key = field(table, KEY, layer, LAYERS)
    lane = tl.arange(0, 32)
    w0, w1, w2, w3 = philox4x32(block * 32 + lane, tl.zeros((), tl.int32), DOMAIN_SKETCH, key)
    out = words + item * 128 + lane
    tl.store(out, w0.to(tl.int32, bitcast=True))
    tl.store(out + 32, w1.to(tl.int32, bitcast=True))
    tl.store(out + 64, w2.to(tl.int32, bitcast=True))
    tl.store(out + 96, w3.to(tl.int32, bitcast=True))
    swap, _, _, _ = philox4x32(block, tl.zeros((), tl.int32), DOMAIN_SWAP, key)
    place = tl.arange(0, RUNS)
    run = block * BLOCK // BUCKETS + place
    offset, _, _, _ = philox4x32(run, run >> 32, DOMAIN_RUN, key)
    offset = (offset & (BUCKETS - 32)) ^ (swap & 31)
    tl.store(offsets + item * RUNS + place, offset.to(tl.int32, bitcast=True))


@triton.jit
def sketch_sums_kernel(
    pointers,
    scratch,
    table,
    norms,
    words,
    offsets,
    partials,
    BUCKETS: tl.constexpr,
    LAYERS: tl.constexpr,
    DTYPE: tl.constexpr,
    SCRATCH: tl.constexpr,
    UNIT: tl.constexpr,
):
    """partials[groups, BUCKETS] of the signed values; grid (groups of all layers, tiles of 4096 buckets).

    Up to 4096 buckets a unit is a block, which holds whole runs. Above, a run covers several blocks and the high bits
    of its offset choose the block that feeds this tile.
    """
    TILE: tl.constexpr = BUCKETS if BUCKETS < BLOCK else BLOCK
    TILES: tl.constexpr = BUCKETS // TILE
    group = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    layer, start = find_layer(table, FIRST_GROUP, group, LAYERS)
    count = field(table, COUNT, layer, LAYERS)
    columns = field(table, COLUMNS, layer, LAYERS)
    first_block = field(table, FIRST_BLOCK, layer, LAYERS)
    groups = field(table, GROUPS, layer, LAYERS)
    norms += field(table, FIRST_FILTER, layer, LAYERS)
    words += first_block * 128
    offsets += first_block * (BLOCK // TILE)
    base = layer_values(pointers, scratch, table, layer, DTYPE, SCRATCH, LAYERS)
    sums = tl.zeros((4, 4, 256), tl.float32)
    whole = count // (BLOCK * TILES)
    for unit in range(start, whole, groups):
        block = unit * TILES
        if TILES > 1:
            block = block + (tile ^ (tl.load(offsets + block) // BLOCK))
        sums += signed_values(base, norms, words, offsets, block, count, columns, BUCKETS, UNIT, True)
    if (whole * (BLOCK * TILES) < count) & ((whole - start) % groups == 0):  # the last unit, which is none
        block = whole * TILES
        if TILES > 1:
            block = block + (tile ^ (tl.load(offsets + block) // BLOCK))
        sums += signed_values(base, norms, words, offsets, block, count, columns, BUCKETS, UNIT, False)
    bucket = tl.max_contiguous(tl.arange(0, TILE), 1)  # else the gathers are laid out as suits a wide store
    tl.store(partials + group * BUCKETS + tile * TILE + bucket, tl.sum(tl.reshape(sums, (BLOCK // TILE, TILE)), axis=0))


@triton.jit
def dense_sums_kernel(
    pointers,
    scratch,
    table,
    norms,
    partials,
    total,
    LAYERS: tl.constexpr,
    DTYPE: tl.constexpr,
    SCRATCH: tl.constexpr,
    UNIT: tl.constexpr,
    PROJECTION: tl.constexpr,
):
    """partials[groups, total] of X·v; grid (groups of all layers, tiles of 32 matrix rows)."""
    group = tl.program_id(0).to(tl.int64)
    first_row = tl.program_id(1) * DENSE_TILE
    layer, start = find_layer(table, FIRST_GROUP, group, LAYERS)
    count = field(table, COUNT, layer, LAYERS)
    columns = field(table, COLUMNS, layer, LAYERS)
    key = field(table, KEY, layer, LAYERS)
    groups = field(table, GROUPS, layer, LAYERS)
    layer_norms = norms + field(table, FIRST_FILTER, layer, LAYERS)
    base = layer_values(pointers, scratch, table, layer, DTYPE, SCRATCH, LAYERS)
    lane = tl.arange(0, 32)
    rows = tl.arange(0, DENSE_TILE)
    sums = tl.zeros((DENSE_TILE,), tl.float32)
    end = tl.minimum(DENSE_TILE, total - first_row)
    if PROJECTION == RADEMACHER:
        at = tl.arange(0, 32)[:, None] * 32 + lane[None, :]
        bit = tl.arange(0, 32)[:, None]
        for block in range(start, tl.cdiv(count, BLOCK), groups):
            first = block * BLOCK
            v0 = load_values(base, layer_norms, first, at, count, columns, UNIT)
            v1 = load_values(base, layer_norms, first, at + 1024, count, columns, UNIT)
            v2 = load_values(base, layer_norms, first, at + 2048, count, columns, UNIT)
            v3 = load_values(base, layer_norms, first, at + 3072, count, columns, UNIT)
            for r in range(0, end):
                w0, w1, w2, w3 = philox4x32(block * 32 + lane, first_row + r, DOMAIN_DENSE, key)
                signed = (flip(v0, w0[None, :], bit) + flip(v1, w1[None, :], bit)) + (
                    flip(v2, w2[None, :], bit) + flip(v3, w3[None, :], bit)
                )
                sums += tl.where(rows == r, tl.sum(tl.sum(signed, axis=0), axis=0), 0.0)
    else:
        step = tl.arange(0, 8)[:, None]
        at = step * 128 + lane[None, :]
        for unit in range(start, tl.cdiv(count, GAUSSIAN_UNIT), groups):
            first = unit * GAUSSIAN_UNIT
            v0 = load_values(base, layer_norms, first, at, count, columns, UNIT)
            v1 = load_values(base, layer_norms, first, at + 32, count, columns, UNIT)
            v2 = load_values(base, layer_norms, first, at + 64, count, columns, UNIT)
            v3 = load_values(base, layer_norms, first, at + 96, count, columns, UNIT)
            for r in range(0, end):
                z0, z1, z2, z3 = normal_values((unit * 8 + step) * 32 + lane[None, :], first_row + r, key)
                product = (z0 * v0 + z1 * v1) + (z2 * v2 + z3 * v3)
                sums += tl.where(rows == r, tl.sum(tl.sum(product, axis=0), axis=0), 0.0)
    tl.store(partials + group * total + first_row + rows, sums, mask=rows < end)


@triton.jit
def adjoint_kernel(
    factor,
    scale,
    residual,
    outputs,
    scratch,
    table,
    words,
    offsets,
    total,
    BUCKETS: tl.constexpr,
    LAYERS: tl.constexpr,
    DTYPE: tl.constexpr,
    SCRATCH: tl.constexpr,
    PROJECTION: tl.constexpr,
):
    """factor · scale · (Pᵀ·residual)[m] for every value of every layer; one program a block of 4096.

    ``factor``, the outer gradient, is read from device memory. Results go to the layers' own ``outputs``, by address,
    or to ``scratch`` where a carrier has more to do with them.
    """
    RUNS: tl.constexpr = BLOCK // BUCKETS if BUCKETS < BLOCK else 1
    item = tl.program_id(0).to(tl.int64)
    layer, block = find_layer(table, FIRST_BLOCK, item, LAYERS)
    key = field(table, KEY, layer, LAYERS)
    left = tl.minimum(field(table, COUNT, layer, LAYERS) - block * BLOCK, BLOCK).to(tl.int32)
    slope = tl.load(factor) * scale
    target = layer_values(outputs, scratch, table, layer, DTYPE, SCRATCH, LAYERS) + block * BLOCK
    lane = tl.arange(0, 32)
    if PROJECTION == SKETCH:
        at = tl.arange(0, BLOCK)
        word = tl.reshape(tl.load(words + item * 128 + tl.arange(0, 128)), (4, 1, 32)).to(tl.uint32, bitcast=True)
        offset = tl.load(offsets + item * RUNS + at // (BLOCK // RUNS)) & (BUCKETS - 1)
        bucket = ((block * BLOCK).to(tl.int32) + at) & (BUCKETS - 1) ^ offset
        value = tl.reshape(tl.load(residual + bucket) * slope, (4, 32, 32))
        value = tl.reshape(flip(value, word, tl.arange(0, 32)[None, :, None]), (BLOCK,))
        tl.store(target + at, value, mask=at < left)
    elif PROJECTION == RADEMACHER:
        bit = tl.arange(0, 32)[:, None]
        at = bit * 32 + lane[None, :]
        s0 = tl.zeros((32, 32), tl.float32)
        s1 = tl.zeros((32, 32), tl.float32)
        s2 = tl.zeros((32, 32), tl.float32)
        s3 = tl.zeros((32, 32), tl.float32)
        for t in range(0, total):
            w0, w1, w2, w3 = philox4x32(block * 32 + lane, t, DOMAIN_DENSE, key)
            value = tl.load(residual + t) * slope
            s0 += flip(value, w0[None, :], bit)
            s1 += flip(value, w1[None, :], bit)
            s2 += flip(value, w2[None, :], bit)
            s3 += flip(value, w3[None, :], bit)
        tl.store(target + at, s0, mask=at < left)
        tl.store(target + 1024 + at, s1, mask=at < left - 1024)
        tl.store(target + 2048 + at, s2, mask=at < left - 2048)
        tl.store(target + 3072 + at, s3, mask=at < left - 3072)
    else:
        step = tl.arange(0, 32)[:, None]
        at = step * 128 + lane[None, :]
        s0 = tl.zeros((32, 32), tl.float32)
        s1 = tl.zeros((32, 32), tl.float32)
        s2 = tl.zeros((32, 32), tl.float32)
        s3 = tl.zeros((32, 32), tl.float32)
        for t in range(0, total):
            z0, z1, z2, z3 = normal_values((block * 32 + step) * 32 + lane[None, :], t, key)
            value = tl.load(residual + t) * slope
            s0 += z0 * value
            s1 += z1 * value
            s2 += z2 * value
            s3 += z3 * value
        tl.store(target + at, s0, mask=at < left)
        tl.store(target + 32 + at, s1, mask=at < left - 32)
        tl.store(target + 64 + at, s2, mask=at < left - 64)
        tl.store(target + 96 + at, s3, mask=at < left - 96)
