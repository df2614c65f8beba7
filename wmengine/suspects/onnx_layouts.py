"""How operators lay out the weights that they hold: quantised by axis or by block, packed in bits, blocked in channels.

The blocked layouts are those of ONNX Runtime's MLAS (MlasReorderFilterOIHWBiBo, MlasReorderFilterOIHWBo): filters, and
where there are enough of them input channels, in blocks of 8 or 16, the last one filled with zeros.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Factors = NDArray[np.float32]
PACKED_BITS = (2, 4, 8)
# What the 16 numbers of four bits stand for, of two kinds: FP4, sign first, and NF4 (Dettmers et al., QLoRA, 2023).
_FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
CODES = np.array([(*_FP4, *(-each for each in _FP4)), _NF4], np.float32)


def per_axis(factor: NDArray[Any], shape: tuple[int, ...], axis: int) -> NDArray[Any]:
    """A factor for a whole tensor of this shape, or one for each index of an axis; it never makes the tensor larger."""
    if factor.size == 1:
        return factor.reshape(())
    if factor.size != shape[axis]:
        raise ValueError(f"{factor.size} factors do not fit an axis of length {shape[axis]}")
    along = [1] * len(shape)
    along[axis] = factor.size
    return factor.reshape(along)


def dequantised(values: Factors, scale: Factors, zero_point: Factors | None, axis: int, block: int) -> Factors:
    """(q − zero point) · scale, with one scale, one for each index of an axis, or one for each block along it."""

    def spread(factor: Factors) -> NDArray[Any]:
        if block <= 0 or factor.ndim != values.ndim:
            return per_axis(factor, values.shape, axis)
        blocks = list(values.shape)
        blocks[axis] = -(-blocks[axis] // block)
        if list(factor.shape) != blocks:
            raise ValueError(f"{list(factor.shape)} factors do not fit {blocks} blocks")
        return factor.take(np.arange(values.shape[axis]) // block, axis=axis)

    return np.asarray((values if zero_point is None else values - spread(zero_point)) * spread(scale), np.float32)


def from_bits(
    packed: NDArray[np.uint8], scales: Factors, zero_points: NDArray[Any] | None, bits: int, columns: int
) -> Factors:
    """MatMulNBits' weight as [N, K]: packed uint8 [N, blocks, bytes of a block] along K, one scale for each block.

    zero_points: packed as the weight is, or one number for each block; the middle of the range where there are none.
    """
    rows, blocks = packed.shape[:2]
    zeros: Any = 1 << bits - 1
    if zero_points is not None and zero_points.dtype == np.uint8:
        zeros = _unpacked(zero_points.reshape(rows, -1), bits)[:, :blocks, None].astype(np.float32)
    elif zero_points is not None:
        zeros = zero_points.astype(np.float32).reshape(rows, blocks, 1)
    steps = _unpacked(packed, bits).astype(np.float32) - np.float32(zeros)
    return np.asarray((steps * scales.reshape(rows, blocks, 1)).reshape(rows, -1)[:, :columns])


def from_codes(packed: NDArray[np.uint8], largest: Factors, shape: tuple[int, int], block: int, kind: int) -> Factors:
    """MatMulBnb4's weight as [N, K]: codes of its values one behind the other, two in a byte, the high bits first, each
    to be multiplied by the largest value of its block."""
    count = math.prod(shape)
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[:count]
    factors = largest.reshape(-1)[np.arange(count) // block]
    return np.asarray((CODES[kind][codes] * factors).reshape(shape), np.float32)


def _unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The numbers of so many bits along the last axis, the lowest bits first."""
    parts = [packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(*packed.shape[:-1], -1)


def unblocked(stored: Factors, block: int, filters: int | None = None, channels: int | None = None) -> Factors:
    """An NCHWc convolution's weight as [O, I/groups, *kernel], its first filters and channels, or all there are."""
    size, inputs, *kernel = stored.shape
    inner = block if inputs % block == 0 else 1  # fewer channels than a block has are not blocked
    parts = stored.reshape(size // block, inputs // inner, *kernel, inner, block)
    last = parts.ndim - 1
    moved = parts.transpose(0, last, 1, last - 1, *range(2, last - 1)).reshape(stored.shape)
    return moved[:filters, :channels]
