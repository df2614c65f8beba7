"""The law: every operator in NumPy and float64, reading like its formula; each kernel is tested against this file.

The generator's layout is drawn in ``csrc/cpu/layout.h`` and in ``docs/design.md``; this mirrors it independently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

LANES = 32
BLOCK = 4096
GAUSSIAN_BLOCK = 128
DOMAIN_DENSE, DOMAIN_SKETCH, DOMAIN_RUN, DOMAIN_SWAP, DOMAIN_GAUSSIAN = 1, 2, 3, 4, 5
STDM_ALPHA, STDM_BETA = 10.0, 10.0
MOST_LEVEL = 30
SMALLEST_NORM = 1.0 / float(np.finfo(np.float32).max)

CARRIERS = ("flat", "unit_filters", "filter_mean", "unit_filter_mean")
PROJECTIONS = ("sketch", "rademacher", "gaussian")
LINKS = ("bce", "hinge", "mse", "stdm")

Float64 = NDArray[np.float64]


def philox4x32(counter: NDArray[np.uint32], key: int) -> NDArray[np.uint32]:
    """Philox4x32-10 of counters uint32[..., 4] under a 64-bit key → uint32[..., 4] (Salmon et al., SC 2011)."""
    c0, c1, c2, c3 = (np.asarray(counter)[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def _words(c0: NDArray[np.int64], c1: NDArray[np.int64] | int, domain: int, key: int) -> NDArray[np.uint32]:
    counter = np.zeros((*np.shape(c0), 4), dtype=np.uint32)
    counter[..., 0] = np.asarray(c0) & 0xFFFFFFFF
    counter[..., 1] = c1
    counter[..., 3] = domain
    return philox4x32(counter, key)


def signs(key: int, count: int, row: int = 0, domain: int = DOMAIN_DENSE, start: int = 0) -> Float64:
    """Signs ±1 of weights ``start`` … ``start + count`` of a row; a set bit is −1."""
    m = np.arange(start, start + count, dtype=np.int64)
    block, i, lane = m // BLOCK, (m % BLOCK) // LANES, m % LANES
    first, last = (int(block[0]), int(block[-1]) + 1) if count else (0, 0)
    words = _words(np.arange(first * LANES, last * LANES, dtype=np.int64), row, domain, key)
    word = words[(block - first) * LANES + lane, i // 32]
    return np.asarray(1.0 - 2.0 * ((word >> (i % 32).astype(np.uint32)) & 1), dtype=np.float64)


def gaussians(key: int, count: int, row: int, start: int = 0) -> Float64:
    """Standard normal values of a dense row by Box and Muller, two from each pair of words."""
    m = np.arange(start, start + count, dtype=np.int64)
    block, i, lane = m // GAUSSIAN_BLOCK, (m % GAUSSIAN_BLOCK) // LANES, m % LANES
    words = _words(block * LANES + lane, row, DOMAIN_GAUSSIAN, key)
    pair = (i // 2) * 2
    at = np.arange(count)
    radius = np.sqrt(-2.0 * np.log(((words[at, pair] >> 8) + 1.0) * 2.0**-24))
    angle = 2.0 * np.pi * (words[at, pair + 1] >> 8) * 2.0**-24
    return np.asarray(radius * np.where(i % 2 == 0, np.cos(angle), np.sin(angle)), dtype=np.float64)


def padded_buckets(total: int) -> int:
    """Buckets of a sketch of ``total`` symbols: the next power of two, at least 32."""
    return max(32, 1 << (total - 1).bit_length())


def buckets(key: int, count: int, total: int, start: int = 0) -> NDArray[np.int64]:
    """Bucket of each weight ``start`` … ``start + count`` among ``total`` (a power of two ≥ 32)."""
    m = np.arange(start, start + count, dtype=np.int64)
    run, block = m // total, m // BLOCK
    offset = _words(run, run >> 32, DOMAIN_RUN, key)[..., 0] & (total - 1) & ~np.uint32(31)
    swap = _words(block, 0, DOMAIN_SWAP, key)[..., 0] & 31
    return ((m % total) ^ offset.astype(np.int64)) ^ swap.astype(np.int64)


def sketch_sums(values: ArrayLike, key: int, total: int) -> Float64:
    """Σ σ(m)·w_m over each of the padded buckets, unscaled; the first ``total`` of them."""
    w = np.asarray(values, dtype=np.float64).reshape(-1)
    width = padded_buckets(total)
    signed = signs(key, w.size, 0, DOMAIN_SKETCH) * w
    return np.bincount(buckets(key, w.size, width), weights=signed, minlength=width)[:total].astype(np.float64)


def projection_row(key: int, count: int, row: int, kind: str) -> Float64:
    """One row of the dense matrix, ``rademacher`` or ``gaussian``."""
    return signs(key, count, row) if kind == "rademacher" else gaussians(key, count, row)


def projection_sums(values: ArrayLike, key: int, total: int, projection: str) -> Float64:
    """P(key)·v for any projection, unscaled: float64[total]."""
    v = np.asarray(values, dtype=np.float64).reshape(-1)
    if projection == "sketch":
        return sketch_sums(v, key, total)
    return np.array([projection_row(key, v.size, t, projection) @ v for t in range(total)], dtype=np.float64)


def projection_adjoint(gradient: ArrayLike, key: int, count: int, projection: str) -> Float64:
    """P(key)ᵀ·g for any projection, unscaled: float64[count]."""
    g = np.asarray(gradient, dtype=np.float64).reshape(-1)
    if projection == "sketch":
        width = padded_buckets(g.size)
        padded = np.concatenate([g, np.zeros(width - g.size)])
        return np.asarray(signs(key, count, 0, DOMAIN_SKETCH) * padded[buckets(key, count, width)])
    result = np.zeros(count)
    for t in range(g.size):
        result += g[t] * projection_row(key, count, t, projection)
    return result


def projection_scale(total: int, count: int, projection: str) -> float:
    """√(P/M) for a sketch, 1/√M for a dense matrix: the projection keeps the mean square of what it reads."""
    if count == 0:
        return 0.0
    return float(np.sqrt((padded_buckets(total) if projection == "sketch" else 1) / count))


def sketch(values: ArrayLike, key: int, total: int) -> Float64:
    """y_t = √(P/M) Σ_{bucket(m)=t} σ(m) w_m."""
    w = np.asarray(values).reshape(-1)
    return projection_scale(total, w.size, "sketch") * sketch_sums(w, key, total)


def sketch_adjoint(gradient: ArrayLike, key: int, count: int) -> Float64:
    """The transpose of :func:`sketch`."""
    g = np.asarray(gradient).reshape(-1)
    return projection_scale(g.size, count, "sketch") * projection_adjoint(g, key, count, "sketch")


def project(values: ArrayLike, key: int, total: int, kind: str = "rademacher") -> Float64:
    """y = X·w / √M with X dense, ``rademacher`` or ``gaussian``."""
    w = np.asarray(values).reshape(-1)
    return projection_scale(total, w.size, kind) * projection_sums(w, key, total, kind)


def project_adjoint(gradient: ArrayLike, key: int, count: int, kind: str = "rademacher") -> Float64:
    """The transpose of :func:`project`."""
    g = np.asarray(gradient).reshape(-1)
    return projection_scale(g.size, count, kind) * projection_adjoint(g, key, count, kind)


def _rows(weight: ArrayLike) -> Float64:
    """W[O, …] as float64[O, K], also where there is no filter or no weight."""
    array = np.asarray(weight, dtype=np.float64)
    return array.reshape(array.shape[0], array.size // array.shape[0] if array.shape[0] else 0)


def unit_rows(weight: ArrayLike) -> tuple[Float64, Float64]:
    """Rows of W[O, K] over their norms, and the inverse norms; a zero row stays zero.

    So does a row so small that float32 cannot hold the inverse of its norm.
    """
    rows = _rows(weight)
    norms = np.sqrt((rows * rows).sum(axis=1))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > SMALLEST_NORM)
    return rows * inverse[:, None], inverse


def carrier_values(weight: ArrayLike, carrier: str) -> Float64:
    """What a carrier reads from one weight [O, …]: O·K values (``flat``, ``unit_filters``) or K (the means)."""
    rows = _rows(weight)
    if carrier in ("unit_filters", "unit_filter_mean"):
        rows = unit_rows(rows)[0]
    return np.asarray(rows.mean(axis=0) if carrier in ("filter_mean", "unit_filter_mean") else rows.reshape(-1))


def carrier_projection(weight: ArrayLike, key: int, total: int, carrier: str, projection: str) -> Float64:
    """P(key)·v of one tensor, unscaled."""
    return projection_sums(carrier_values(weight, carrier), key, total, projection)


def _softplus(x: Float64) -> Float64:
    return np.asarray(np.logaddexp(0.0, x))


def _sigmoid(x: Float64) -> Float64:
    return np.asarray(np.exp(-np.logaddexp(0.0, -x)))


def link_loss(y: ArrayLike, bits: ArrayLike, link: str, margin: float = 1.0) -> tuple[float, Float64]:
    """Loss of the projected carrier against the bits, summed over them, and its derivative by y."""
    z = np.asarray(y, dtype=np.float64)
    s = 2.0 * np.asarray(bits, dtype=np.float64) - 1.0
    if link == "bce":
        return float(_softplus(-s * z).sum()), -s * _sigmoid(-s * z)
    if link == "hinge":
        gap = margin - s * z
        return float(np.where(np.isnan(gap), gap, np.maximum(gap, 0.0)).sum()), np.where(gap > 0, -s, 0.0 * gap)
    if link == "mse":
        return float(((z - margin * s) ** 2).sum()), 2.0 * (z - margin * s)
    inner = STDM_ALPHA * np.sin(STDM_BETA * z)
    slope = STDM_ALPHA * STDM_BETA * np.cos(STDM_BETA * z)
    return float(_softplus(-s * inner).sum()), -s * _sigmoid(-s * inner) * slope


def embedding_loss(
    weights: Sequence[ArrayLike],
    keys: Sequence[int],
    bits: ArrayLike,
    *,
    carrier: str,
    projection: str,
    link: str,
    margin: float = 1.0,
    scale: float | None = None,
) -> tuple[float, Float64, list[Float64]]:
    """(loss, y[T], gradients by each weight) of carrier → projection → link, one set of bits over all weights."""
    total = np.asarray(bits).size
    values = [carrier_values(w, carrier) for w in weights]
    if scale is None:
        scale = projection_scale(total, sum(v.size for v in values), projection)
    y = np.zeros(total)
    for v, key in zip(values, keys, strict=True):
        y += scale * projection_sums(v, key, total, projection)
    loss, residual = link_loss(y, bits, link, margin)
    gradients = []
    for weight, v, key in zip(weights, values, keys, strict=True):
        shape = np.shape(weight)
        g = projection_adjoint(scale * residual, key, v.size, projection)
        if carrier in ("filter_mean", "unit_filter_mean"):
            g = np.tile(g / shape[0], shape[0])
        g = g.reshape(shape[0], -1)
        if carrier in ("unit_filters", "unit_filter_mean"):
            unit, inverse = unit_rows(weight)
            g = inverse[:, None] * (g - unit * (unit * g).sum(axis=1, keepdims=True))
        gradients.append(g.reshape(shape))
    return loss, y, gradients


@dataclass(frozen=True)
class CrossEntropyReference:
    """What :func:`marked_cross_entropy` returns: the loss, sums and hits per group, and the gradient by the logits."""

    loss: float
    group_loss: Float64
    group_hits: NDArray[np.int64]
    gradient: Float64


def marked_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    weight: ArrayLike | None = None,
    group: ArrayLike | None = None,
    *,
    groups: int = 1,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> CrossEntropyReference:
    """Σ w_n ℓ_n (or its mean over the weights), ℓ_n = lse − (1−ε)·z_label − ε·mean(z), with sums and hits per group."""
    z = np.asarray(logits, dtype=np.float64)
    label = np.asarray(labels, dtype=np.int64)
    n, classes = z.shape
    keep = label != ignore_index
    w = np.where(keep, 1.0 if weight is None else np.asarray(weight, dtype=np.float64), 0.0)
    g = np.zeros(n, dtype=np.int64) if group is None else np.asarray(group, dtype=np.int64)
    with np.errstate(invalid="ignore"):
        top = z.max(axis=1, keepdims=True) if classes else np.zeros((n, 1))
        below = z - top  # from here on no shift of a row changes anything
        exponent = np.exp(below)
        lse = np.log(exponent.sum(axis=1))
        target = np.full_like(z, label_smoothing / classes)
        target[np.arange(n)[keep], label[keep]] += 1.0 - label_smoothing
        chosen = np.take_along_axis(below, np.where(keep, label, 0)[:, None], axis=1)[:, 0]
        losses = lse - (1.0 - label_smoothing) * chosen
        if label_smoothing:
            losses = losses - label_smoothing * below.mean(axis=1)
        losses = np.where(keep, losses, 0.0)
        hits = keep & (z.argmax(axis=1) == label) & ~np.isnan(lse)
        weighted = np.where(keep, w * losses, 0.0)
        denominator = w.sum() if reduction == "mean" else 1.0
        loss = np.float64(weighted.sum()) / denominator
        softmax = exponent / exponent.sum(axis=1, keepdims=True)
        gradient = np.where(keep[:, None], (w / denominator)[:, None] * (softmax - target), 0.0)
    return CrossEntropyReference(
        float(loss),
        np.bincount(g, weights=weighted, minlength=groups).astype(np.float64),
        np.bincount(g[hits], minlength=groups).astype(np.int64),
        gradient,
    )


class MatchCounts(NamedTuple):
    """What `match_counts` returns for N rows of C scores in G groups: arrays, or tensors on the device of the scores.

    predicted: int32[N], the class of each row, −1 where the row is invalid. at: int8[N], the level of the expected
    class, 0 where the row is invalid or the label is no class. histogram: uint32[N, 61], how many classes of the row
    have level −30 … 30; an invalid row has all of them at 0. hits and invalid: int32[G], rows of each group that name
    the expected class, and that are invalid. levels: int8[N, C], of every class, or None where they were not asked for.
    """

    predicted: Any
    at: Any
    histogram: Any
    hits: Any
    invalid: Any
    levels: Any


def match_counts(
    outputs: ArrayLike, expected: ArrayLike, group: ArrayLike | None = None, groups: int = 1, *, levels: bool = False
) -> MatchCounts:
    """The class of each row of outputs[N, C], the first of its highest scores, and the levels of its classes.

    A row is invalid that holds NaN or +Inf, or nothing above −Inf, which is the score of a chance of 0. expected[N] are
    any integers, of which those in 0..C−1 are classes; 0 ≤ group[N] < groups.
    """
    x, label = np.asarray(outputs, dtype=np.float64), np.asarray(expected)
    rows, classes = x.shape
    valid = np.isfinite(x.max(axis=1))
    predicted = np.where(valid, x.argmax(axis=1), -1).astype(np.int32)
    level = np.zeros((rows, classes), dtype=np.int8)
    level[valid] = standard_levels(x[valid])
    known = valid & (label >= 0) & (label < classes)
    at = np.where(known, level[np.arange(rows), np.where(known, label, 0).astype(np.int64)], 0).astype(np.int8)
    histogram = np.zeros((rows, 2 * MOST_LEVEL + 1), dtype=np.uint32)
    np.add.at(histogram, (np.arange(rows)[:, None], level.astype(np.int64) + MOST_LEVEL), 1)
    g = np.zeros(rows, dtype=np.int64) if group is None else np.asarray(group, dtype=np.int64)
    hit = known & (predicted == label)
    hits, invalid = (np.bincount(g[those], minlength=groups).astype(np.int32) for those in (hit, ~valid))
    return MatchCounts(predicted, at, histogram, hits, invalid, level if levels else None)


def standard_levels(x: Float64) -> NDArray[np.int8]:
    """Tenths of a deviation from the row's mean, −30 to 30, of scores x[N, C] or of the logarithms of distributions.

    Mean and deviation are of what is above −Inf, which itself has level −30. Where all are equal, but for rounding, the
    level is 0.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        distribution = (x >= 0.0).all(axis=1, keepdims=True) & (np.abs(x.sum(axis=1, keepdims=True) - 1.0) <= 1e-3)
        z = np.where(distribution, np.log(x), x)
        there = z > -np.inf
        largest = np.where(there, np.abs(z), 0.0).max(axis=1, keepdims=True)
        z = z / np.where(largest > 0.0, largest, 1.0)  # so that no square is too large; levels have no unit
        count = there.sum(axis=1, keepdims=True)
        from_mean = z - np.where(there, z, 0.0).sum(axis=1, keepdims=True) / count
        deviation = np.sqrt((np.where(there, from_mean, 0.0) ** 2).sum(axis=1, keepdims=True) / count)
        scaled = np.where(deviation > 1e-12, 10.0 * from_mean / deviation, 0.0)
        return np.where(there, np.clip(np.rint(scaled), -MOST_LEVEL, MOST_LEVEL), -MOST_LEVEL).astype(np.int8)


@dataclass(frozen=True)
class SoftNeighborReference:
    """What :func:`soft_nearest_neighbor` returns: the loss, its gradient by the features and by the temperature."""

    loss: float
    gradient: Float64
    temperature_gradient: float


def soft_nearest_neighbor(features: ArrayLike, labels: ArrayLike, temperature: float) -> SoftNeighborReference:
    """Mean over i of −log(Σ_{j≠i, y_j=y_i} e^{−d_ij/T} / Σ_{j≠i} e^{−d_ij/T}), d_ij = ‖x_i − x_j‖².

    Rows without another of their label are left out of the mean; without any other row the loss is 0. A feature that
    is not finite makes everything NaN.
    """
    x, y = np.asarray(features, dtype=np.float64), np.asarray(labels)
    n = len(x)
    same = (y[:, None] == y[None, :]) & ~np.eye(n, dtype=bool)
    other = y[:, None] != y[None, :]
    counted = same.any(axis=1)
    if not np.isfinite(x).all():
        return SoftNeighborReference(np.nan, np.full_like(x, np.nan), np.nan)
    if not counted.any():
        return SoftNeighborReference(0.0, np.zeros_like(x), 0.0)
    d = np.stack([((row - x) ** 2).sum(axis=1) for row in x])
    both = counted & other.any(axis=1)
    losses, weight = np.zeros(n), np.zeros((n, n))  # weight: dloss_i / d(d_ij / T)
    for i in np.flatnonzero(both):
        log_same, log_other = (np.logaddexp.reduce(-d[i, mask[i]] / temperature) for mask in (same, other))
        losses[i] = np.logaddexp(0.0, log_other - log_same)
        share = -np.expm1(-losses[i])
        weight[i, same[i]] = share * np.exp(-d[i, same[i]] / temperature - log_same)
        weight[i, other[i]] = -share * np.exp(-d[i, other[i]] / temperature - log_other)
    weight /= counted.sum()
    pairs = weight + weight.T
    gradient = np.stack([2.0 / temperature * (w @ (row - x)) for w, row in zip(pairs, x, strict=True)])
    by_temperature = -float((weight * d).sum()) / temperature**2
    return SoftNeighborReference(float(losses.sum() / counted.sum()), gradient, by_temperature)


def label_matches(predicted: ArrayLike, expected: ArrayLike) -> NDArray[np.int32]:
    """counts[S, K] of places where predicted[S, N] is expected[K, N] and not negative."""
    p, e = np.asarray(predicted)[:, None, :], np.asarray(expected)[None, :, :]
    return np.asarray(((p == e) & (p >= 0) & (e >= 0)).sum(axis=-1), dtype=np.int32)


def bit_matches(messages: ArrayLike, registry: ArrayLike) -> NDArray[np.int32]:
    """counts[S, K] of equal bits of messages[S, T] and registry[K, T], which hold 0 and 1."""
    return np.asarray((np.asarray(messages)[:, None, :] == np.asarray(registry)[None, :, :]).sum(axis=-1), np.int32)


def best_bit_matches(
    messages: ArrayLike, registry: ArrayLike, best: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """(counts[S, best], rows[S, best]) of the registry rows with most equal bits; ties to the lowest row."""
    counts = bit_matches(messages, registry)
    rows = np.argsort(-counts, axis=1, kind="stable")[:, :best]
    return np.take_along_axis(counts, rows, axis=1), rows.astype(np.int64)
