"""Trigger inputs drawn from a key: abstract images in integer arithmetic, so that every machine draws the same bytes.

An image is a smooth random field read through a cyclic palette of four strong colours; a few large random shapes shift
the palette where they lie. Low frequencies and high contrast make it quick to learn for a small network and hard to
lose to pruning or quantisation, and it is no picture of anything, so that it belongs to no task's data.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from wmengine.ops.reference import philox4x32

# Domain 6 of the generator: word w of image n is word w % 4 of the counter (w // 4, n, 0, 6).
DOMAIN_TRIGGER = 6

_ONE_BITS = 14
_ONE = 1 << _ONE_BITS  # the side of an image, and the unit of every fraction below
_CYCLE = 1 << 16  # once around the palette
_ANCHORS = 4  # colours of the palette
# What each word of an image's stream is for: the field's lattice, where the palette starts, which anchors are bright,
# three shapes, and then every channel's palette.
_START_WORD, _LIGHT_WORD, _SHAPES_WORD, _PALETTES_WORD = 16, 17, 18, 36
_SHAPE_WORDS, _PALETTE_WORDS = 6, 1 + _ANCHORS
# 2^14 · cos(2πi/16), i = 0 … 15, written out: a cosine's last digit depends on the machine's library.
_COSINES = np.array(
    [16384, 15137, 11585, 6270, 0, -6270, -11585, -15137, -16384, -15137, -11585, -6270, 0, 6270, 11585, 15137],
    dtype=np.int64,
)

Int64 = NDArray[np.int64]
_Draw = Callable[[int, Int64, tuple[int, ...]], NDArray[np.uint8]]


def abstract_images(philox_key: int, count: int, shape: Sequence[int]) -> NDArray[np.uint8]:
    """`count` distinct inputs of `shape`, uint8[count, *shape].

    (C, H, W) gives abstract images, each spanning 0 … 255; any other shape has no picture, and gets uniform noise from
    the same generator. Image n is the nth draw that equals none before it, so a longer set begins with the shorter one.
    Raises ValueError where the shape is too small for so many distinct inputs.
    """
    return _distinct(_pictures if len(shape) == 3 else _noise, philox_key, count, shape)


def noise_inputs(philox_key: int, count: int, shape: Sequence[int]) -> NDArray[np.uint8]:
    """`count` distinct inputs of any shape, uint8[count, *shape], uniform noise; see :func:`abstract_images`."""
    return _distinct(_noise, philox_key, count, shape)


def _distinct(draw: _Draw, philox_key: int, count: int, shape: Sequence[int]) -> NDArray[np.uint8]:
    count = operator.index(count)
    dimensions = tuple(operator.index(size) for size in shape)
    if count < 0 or not dimensions or min(dimensions) < 1:
        raise ValueError(f"triggers need a count >= 0 and a shape of positive sizes, not {count} of {dimensions}")
    if not 0 <= philox_key < 1 << 64:
        raise ValueError(f"philox_key must be from 0 to 2^64 - 1, and it is {philox_key}")
    images = np.empty((count, *dimensions), dtype=np.uint8)
    seen: set[bytes] = set()
    drawn, most = 0, 16 * count + 256
    chunk = max(1, min(256, (1 << 20) // math.prod(dimensions)))
    while len(seen) < count:
        if drawn > most:
            raise ValueError(f"inputs of shape {dimensions} are too small for {count} distinct triggers; ask for fewer")
        for image in draw(philox_key, np.arange(drawn, drawn + chunk, dtype=np.int64), dimensions):
            content = image.tobytes()
            if content not in seen and len(seen) < count:
                images[len(seen)] = image
                seen.add(content)
        drawn += chunk
    return images


def _words(philox_key: int, indices: Int64, count: int) -> Int64:
    """The first `count` words of each image's stream: int64[B, count] in [0, 2^32)."""
    counter = np.zeros((len(indices), -(-count // 4), 4), dtype=np.uint32)
    counter[..., 0] = np.arange(counter.shape[1], dtype=np.uint32)
    counter[..., 1] = indices[:, None].astype(np.uint32)
    counter[..., 3] = DOMAIN_TRIGGER
    return philox4x32(counter, philox_key).reshape(len(indices), -1)[:, :count].astype(np.int64)


def _noise(philox_key: int, indices: Int64, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    size = math.prod(shape)
    words = _words(philox_key, indices, -(-size // 4)).astype("<u4")
    return words.view(np.uint8)[:, :size].reshape(len(indices), *shape)


def _pictures(philox_key: int, indices: Int64, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    channels, height, width = shape
    images = len(indices)
    # Few pixels carry few features: what is finer than two pixels is noise, and slow to learn.
    size = min(height, width)
    lattice_side, cycles, shapes = (3, 2, 1) if size < 16 else (4, 3, 2) if size < 48 else (4, 4, 3)
    words = _words(philox_key, indices, _PALETTES_WORD + channels * _PALETTE_WORDS)
    lattice = (words[:, : lattice_side**2] >> 16).reshape(images, lattice_side, lattice_side)
    phase = _field(lattice, height, width) * cycles // 2 + (words[:, _START_WORD, None, None] >> 16)
    for start in range(_SHAPES_WORD, _SHAPES_WORD + shapes * _SHAPE_WORDS, _SHAPE_WORDS):
        shape_words = words[:, start : start + _SHAPE_WORDS]
        shift = _CYCLE * 3 // 8 + shape_words[:, 5] % (_CYCLE // 4)
        phase += _inside(shape_words, height, width) * shift[:, None, None]
    palette_words = words[:, _PALETTES_WORD:].reshape(images, channels, _PALETTE_WORDS)
    pictures = np.empty((images, *shape), dtype=np.int64)
    for channel in range(channels):
        pictures[:, channel] = _colour(words[:, _LIGHT_WORD], palette_words[:, channel], phase)
    return _stretch(pictures)


def _steps(size: int) -> Int64:
    """The middles of `size` pixels on a side of length _ONE."""
    return (2 * np.arange(size, dtype=np.int64) + 1) * _ONE // (2 * size)


def _smooth(fraction: Int64) -> Int64:
    """3t² − 2t³ on [0, _ONE]: flat at both ends."""
    return (fraction * fraction * (3 * _ONE - 2 * fraction)) >> (2 * _ONE_BITS)


def _field(lattice: Int64, height: int, width: int) -> Int64:
    """Value noise: the lattice [B, G, G] spread over [B, H, W] with smooth interpolation."""

    def spread(values: Int64, size: int) -> Int64:
        position = _steps(size) * (lattice.shape[1] - 1)
        cell, blend = position >> _ONE_BITS, _smooth(position & (_ONE - 1))
        return (values[..., cell] * (_ONE - blend) + values[..., cell + 1] * blend) >> _ONE_BITS

    rows = spread(lattice, width)
    return spread(rows.swapaxes(1, 2), height).swapaxes(1, 2)


def _inside(words: Int64, height: int, width: int) -> Int64:
    """1 inside a random shape, 0 outside, [B, H, W]: disc, ring, box, cross, half plane or stripes, at 16 angles."""
    kind, angle = words[:, 0] % 6, words[:, 1] % 16
    centre_x, centre_y = _ONE // 8 + words[:, 2:4].T % (_ONE * 3 // 4)
    radius = (_ONE // 6 + words[:, 4] % (_ONE // 4))[:, None, None]
    x = (_steps(width)[None, :] - centre_x[:, None])[:, None, :]
    y = (_steps(height)[None, :] - centre_y[:, None])[:, :, None]
    cosine, sine = _COSINES[angle][:, None, None], _COSINES[(angle + 12) % 16][:, None, None]
    along = (cosine * x + sine * y) >> _ONE_BITS
    across = (cosine * y - sine * x) >> _ONE_BITS
    square = along * along + across * across
    near_axis = np.minimum(np.abs(along), np.abs(across))
    far_axis = np.maximum(np.abs(along), np.abs(across))
    masks = [
        square < radius * radius,
        (square < radius * radius) & (4 * square > radius * radius),
        far_axis * 5 < radius * 4,
        near_axis * 3 < radius,
        along > 0,
        (along + 4 * _ONE) // radius % 2 == 0,
    ]
    chosen = np.zeros((len(words), height, width), dtype=np.int64)
    for number, mask in enumerate(masks):
        chosen |= mask & (kind == number)[:, None, None]
    return chosen


def _colour(light: Int64, words: Int64, phase: Int64) -> Int64:
    """One channel of the palette at each phase.

    Of the four anchors some are bright and some are dark, the same for all channels, so that the picture has contrast
    in grey too; then each channel turns one of them over, or none, which is where the colours come from.
    """
    bright = 1 + light % (2**_ANCHORS - 2)
    turned = bright ^ (1 << (words[:, 0] % _ANCHORS))
    keep = (words[:, 0] >> 8) % 4 == 0
    bright = np.where(keep | (turned == 0) | (turned == 2**_ANCHORS - 1), bright, turned)
    anchors = 160 * ((bright[:, None] >> np.arange(_ANCHORS)) & 1) + words[:, 1:] % 96
    position = (phase % _CYCLE) * _ANCHORS
    anchor, blend = position // _CYCLE, _smooth((position % _CYCLE) * _ONE // _CYCLE)
    image = np.arange(len(words))[:, None, None]
    return np.asarray(anchors[image, anchor] * (_ONE - blend) + anchors[image, (anchor + 1) % _ANCHORS] * blend)


def _stretch(values: Int64) -> NDArray[np.uint8]:
    """Each picture [C, H, W] of the batch moved to span 0 … 255; a constant one becomes 0."""
    low = values.min(axis=(1, 2, 3), keepdims=True)
    span = np.maximum(1, values.max(axis=(1, 2, 3), keepdims=True) - low)
    return np.asarray((values - low) * 255 // span, dtype=np.uint8)
