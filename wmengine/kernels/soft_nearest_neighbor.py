"""The soft nearest neighbour loss over slabs of the matrix of distances: some rows of it, all columns, then the next.

A slab is a product of centred features, n_i + n_j − 2 x_i·x_j, in three TF32 products (one would lose what is left
when the norms cancel); a tile with pairs that cancel all the same is computed again from differences of the features
as they were given. For the loss, one program a row adds the slab up. For the gradient, one program a row turns it into
weights and adds the near pairs' part; a product of weights and features adds the rest. Every number has one owner,
which adds in a fixed order. What stays on the device as a scalar: 1/T, the count of rows, and a poison that is 0 or
NaN.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

import torch
import triton
import triton.language as tl

from wmengine.kernels import launches

Tensor = torch.Tensor

SLAB = 1 << 22  # distances held at a time
NEAR = tl.constexpr(1.0 / 64)  # of the sum of the norms: below, a distance has lost too many bits
LARGEST = tl.constexpr(3.4028234663852886e38)
_LARGEST = 3.4028234663852886e38


@triton.jit
def distances_kernel(
    features,
    centered,
    norms,
    inverse_temperature,
    slab,
    first,
    last,
    rows,
    size,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """slab[last − first, rows] = ‖x_i − x_j‖² for first ≤ i < last, of features[rows, size]; −1 stands for i = j."""
    i = (first + tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    j = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    step = tl.arange(0, STEP)
    products = tl.zeros((TILE, TILE), tl.float32)
    for k in range(0, size, STEP):
        inside = k + step < size
        x = tl.load(
            centered + (i * size)[:, None] + (k + step)[None, :], mask=(i < last)[:, None] & inside[None, :], other=0.0
        )
        y = tl.load(
            centered + (j * size)[None, :] + (k + step)[:, None], mask=(j < rows)[None, :] & inside[:, None], other=0.0
        )
        products = tl.dot(x, y, products, input_precision="tf32x3")
    own = tl.load(norms + i, mask=i < last, other=0.0)
    others = tl.load(norms + j, mask=j < rows, other=0.0)
    sums = own[:, None] + others[None, :]
    d = tl.maximum(sums - 2.0 * products, 0.0)
    itself = i[:, None] == j[None, :]
    # where the norms are below the temperature, what cancels is nothing to the exponent
    near = (d <= sums * NEAR) & (sums * tl.load(inverse_temperature) > 1.0) & (itself == 0)
    if tl.max(tl.max(near.to(tl.int32), axis=1), axis=0) > 0:
        exact = tl.zeros((TILE, TILE), tl.float32)
        for k in range(0, size):
            x = tl.load(features + i * size + k, mask=i < last, other=0.0)
            y = tl.load(features + j * size + k, mask=j < rows, other=0.0)
            difference = x[:, None] - y[None, :]
            exact += difference * difference
        d = tl.where(near, exact, d)
    place = ((i - first) * rows)[:, None] + j[None, :]
    tl.store(slab + place, tl.where(itself, -1.0, d), mask=(i < last)[:, None] & (j < rows)[None, :])


@triton.jit
def rows_kernel(slab, labels, inverse_temperature, nearest, losses, counted, first, rows, STEP: tl.constexpr):
    """Row `first` + program: its loss, whether it counts, and what its weights need: nearest[4, rows].

    Of the others of its own label, then of those of other labels: the least squared distance m, and the row's share
    over Σ_j exp((m − d_ij) / T), where exp(−loss) = 1 − share; both are 0 in a row without others of both kinds.
    """
    i = first + tl.program_id(0).to(tl.int64)
    line = slab + tl.program_id(0).to(tl.int64) * rows
    own = tl.load(labels + i)
    scale = tl.load(inverse_temperature)
    step = tl.arange(0, STEP)
    same_least = tl.full((STEP,), LARGEST, tl.float32)
    other_least = tl.full((STEP,), LARGEST, tl.float32)
    for c in range(0, rows, STEP):
        inside = c + step < rows
        d = tl.load(line + c + step, mask=inside, other=-1.0)
        same = tl.load(labels + c + step, mask=inside, other=0) == own
        same_least = tl.minimum(same_least, tl.where(same & (d >= 0.0), d, LARGEST))
        other_least = tl.minimum(other_least, tl.where((same == 0) & (d >= 0.0), d, LARGEST))
    same_nearest = tl.min(same_least, axis=0)
    other_nearest = tl.min(other_least, axis=0)
    same_sums = tl.zeros((STEP,), tl.float32)
    other_sums = tl.zeros((STEP,), tl.float32)
    for c in range(0, rows, STEP):
        inside = c + step < rows
        d = tl.load(line + c + step, mask=inside, other=-1.0)
        same = tl.load(labels + c + step, mask=inside, other=0) == own
        e = tl.exp((tl.where(same, same_nearest, other_nearest) - d) * scale)
        same_sums += tl.where(same & (d >= 0.0), e, 0.0)
        other_sums += tl.where((same == 0) & (d >= 0.0), e, 0.0)
    same_sum = tl.sum(same_sums, axis=0)
    other_sum = tl.sum(other_sums, axis=0)
    both = (same_sum > 0.0) & (other_sum > 0.0)
    same_sum_or_1 = tl.where(same_sum > 0.0, same_sum, 1.0)
    other_sum_or_1 = tl.where(other_sum > 0.0, other_sum, 1.0)
    ratio = tl.where(both, (same_nearest - other_nearest) * scale, 0.0)
    ratio += tl.log(other_sum_or_1) - tl.log(same_sum_or_1)
    small = tl.exp(-tl.abs(ratio))
    loss = tl.maximum(ratio, 0.0) + tl.log(1.0 + small)
    share = tl.where(ratio > 0.0, 1.0, small) / (1.0 + small)
    tl.store(losses + i, tl.where(both, loss, 0.0))
    tl.store(counted + i, tl.where(same_sum > 0.0, 1.0, 0.0))
    tl.store(nearest + i, tl.where(both, same_nearest, 0.0))
    tl.store(nearest + rows + i, tl.where(both, share / same_sum_or_1, 0.0))
    tl.store(nearest + 2 * rows + i, tl.where(both, other_nearest, 0.0))
    tl.store(nearest + 3 * rows + i, tl.where(both, share / other_sum_or_1, 0.0))


@triton.jit
def weights_kernel(
    slab,
    features,
    norms,
    labels,
    inverse_temperature,
    nearest,
    near_sums,
    weight_sums,
    distance_sums,
    first,
    rows,
    size,
    GRADIENT: tl.constexpr,
    STEP: tl.constexpr,
):
    """Row `first` + program of the slab: weights in place of distances, and what the row's gradient needs of them.

    weight_sums = Σ_j W_ij, distance_sums = Σ_j W_ij d_ij, near_sums[rows, size] = Σ W_ij (x_i − x_j) over near pairs,
    whose weights then read 0.
    """
    i = first + tl.program_id(0).to(tl.int64)
    line = slab + tl.program_id(0).to(tl.int64) * rows
    own = tl.load(labels + i)
    own_norm = tl.load(norms + i)
    own_same_nearest = tl.load(nearest + i)
    own_same = tl.load(nearest + rows + i)
    own_other_nearest = tl.load(nearest + 2 * rows + i)
    own_other = tl.load(nearest + 3 * rows + i)
    scale = tl.load(inverse_temperature)
    step = tl.arange(0, STEP)
    weights = tl.zeros((STEP,), tl.float32)
    distances = tl.zeros((STEP,), tl.float32)
    if GRADIENT:
        for k in range(0, size, STEP):
            tl.store(near_sums + i * size + k + step, tl.zeros((STEP,), tl.float32), mask=k + step < size)
    for c in range(0, rows, STEP):
        j = c + step
        inside = j < rows
        d = tl.load(line + j, mask=inside, other=-1.0)
        pair = d >= 0.0
        same = tl.load(labels + j, mask=inside, other=0) == own
        same_nearest = tl.load(nearest + j, mask=inside, other=0.0)
        same_weight = tl.load(nearest + rows + j, mask=inside, other=0.0)
        other_nearest = tl.load(nearest + 2 * rows + j, mask=inside, other=0.0)
        other_weight = tl.load(nearest + 3 * rows + j, mask=inside, other=0.0)
        # A row that does not count has no nearest and weighs nothing: the exponent stays at most 0 all the same.
        from_own = tl.exp(tl.minimum((tl.where(same, own_same_nearest, own_other_nearest) - d) * scale, 0.0))
        from_other = tl.exp(tl.minimum((tl.where(same, same_nearest, other_nearest) - d) * scale, 0.0))
        w = from_own * tl.where(same, own_same, -own_other) + from_other * tl.where(same, same_weight, -other_weight)
        w = tl.where(pair, w, 0.0)
        distances += w * tl.where(pair, d, 0.0)
        if GRADIENT:
            sums = own_norm + tl.load(norms + j, mask=inside, other=0.0)
            left = (pair & (d <= sums * NEAR) & (sums * scale > 1.0)).to(tl.int32)
            while tl.max(left, axis=0) > 0:
                place = tl.min(tl.where(left > 0, step, STEP), axis=0)
                near_weight = tl.sum(tl.where(step == place, w, 0.0), axis=0)
                other_row = (c + place).to(tl.int64) * size
                for k in range(0, size, STEP):
                    here = k + step < size
                    x = tl.load(features + i * size + k + step, mask=here, other=0.0)
                    y = tl.load(features + other_row + k + step, mask=here, other=0.0)
                    sums_here = tl.load(near_sums + i * size + k + step, mask=here, other=0.0)
                    tl.store(near_sums + i * size + k + step, sums_here + near_weight * (x - y), mask=here)
                left = tl.where(step == place, 0, left)
                w = tl.where(step == place, 0.0, w)
            weights += w
            tl.store(line + j, w, mask=inside)
    tl.store(weight_sums + i, tl.sum(weights, axis=0))
    tl.store(distance_sums + i, tl.sum(distances, axis=0))


@triton.jit
def gradient_kernel(
    slab,
    centered,
    weight_sums,
    factor,
    gradient,
    first,
    last,
    rows,
    size,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """gradient[rows, size] holds the near pairs' part: factor · (it + Σ_j W_ij (x_i − x_j)) for first ≤ i < last."""
    i = (first + tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    step = tl.arange(0, STEP)
    weighted = tl.zeros((TILE, TILE), tl.float32)
    for c in range(0, rows, STEP):
        j = (c + step).to(tl.int64)
        w = tl.load(
            slab + ((i - first) * rows)[:, None] + j[None, :], mask=(i < last)[:, None] & (j < rows)[None, :], other=0.0
        )
        y = tl.load(
            centered + (j * size)[:, None] + k[None, :], mask=(j < rows)[:, None] & (k < size)[None, :], other=0.0
        )
        weighted = tl.dot(w, y, weighted, input_precision="tf32x3")
    inside = (i < last)[:, None] & (k < size)[None, :]
    place = (i * size)[:, None] + k[None, :]
    x = tl.load(centered + place, mask=inside, other=0.0)
    near = tl.load(gradient + place, mask=inside, other=0.0)
    total = near + tl.load(weight_sums + i, mask=i < last, other=0.0)[:, None] * x - weighted
    tl.store(gradient + place, tl.load(factor) * total, mask=inside)


def loss_and_gradients(
    features: Tensor, labels: Tensor, temperature: Tensor, by_features: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its gradients by the features, empty where not asked for, and by the temperature), all float32.

    features[N, D] are float32, labels[N] int64, the temperature is a float32 scalar on the device.
    """
    x, labels = features.contiguous(), labels.contiguous()
    rows, size = x.shape
    centered = x - x.mean(dim=0, dtype=torch.float64).float() if rows else x  # a sum of float32 might overflow
    norms = (centered * centered).sum(dim=1)
    inverse = (1.0 / temperature).clamp(max=_LARGEST)
    fits = (norms < _LARGEST / 8).all()  # and then so does every distance; NaN is not less
    poison = torch.where((temperature > 0) & (temperature < torch.inf) & fits, x.new_zeros(()), torch.nan)

    nearest, gradient = x.new_empty((4, rows)), x.new_empty((rows, size) if by_features else 0)
    losses, counted, weight_sums, distance_sums = (x.new_empty(rows) for _ in range(4))
    tiles, lines = launches.chosen("soft_neighbor_tiles", rows), launches.chosen("soft_neighbor_rows", rows)
    tile = tiles.blocks["TILE"]
    height = max(tile, SLAB // max(rows, 1) // tile * tile)
    slabs = [(first, min(first + height, rows)) for first in range(0, rows, height)]
    slab = x.new_empty(min(height, rows) * rows)

    def distances(first: int, last: int) -> None:
        distances_kernel[(triton.cdiv(last - first, tile), triton.cdiv(rows, tile))](
            x, centered, norms, inverse, slab, first, last, rows, size, **tiles.options()
        )

    for first, last in slabs:
        distances(first, last)
        rows_kernel[(last - first,)](slab, labels, inverse, nearest, losses, counted, first, rows, **lines.options())
    mean = 1.0 / counted.sum().clamp(min=1.0) + poison
    factor = 2.0 * mean * inverse
    for first, last in slabs:
        if len(slabs) > 1:  # else the distances are still there
            distances(first, last)
        weights_kernel[(last - first,)](
            slab,
            x,
            norms,
            labels,
            inverse,
            nearest,
            gradient,
            weight_sums,
            distance_sums,
            first,
            rows,
            size,
            GRADIENT=by_features,
            **lines.options(),
        )
        if by_features and size:
            gradient_kernel[(triton.cdiv(last - first, tile), triton.cdiv(size, tile))](
                slab, centered, weight_sums, factor, gradient, first, last, rows, size, **tiles.options()
            )
    pairs = 0.5 * distance_sums.sum(dtype=torch.float64)
    return losses.sum() * mean, gradient, (-mean * inverse.double() * inverse.double() * pairs).float()
