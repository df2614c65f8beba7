"""The keyed pattern: which classes a network prefers a little, on which inputs.

An input has features u [D], those of an unmarked network. Bit t bends the answers of inputs by tanh(g_t · u), g_t a
keyed direction, towards some classes and away from others, v_t a keyed contrast of them: the sum over all bits is the
pattern, added to the logits. Directions and contrasts are geometry, the signs are the symbols.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.identity.subkeys import keyed_bits

CLIP = 3.0  # of a feature, whose standard deviation is 1
_COINS = 16  # of which a normal number is made: their number of ones, 8 ± 2
_AT_ONCE = 2048  # inputs, of which each bit takes a number

Floats = NDArray[np.float64]


def keyed_normals(subkey: bytes, rows: int, columns: int) -> NDArray[np.uint8]:
    """uint8 [rows, columns], 0 … 16: how many of 16 keyed bits are 1, which is as good as normal with 8 ± 2."""
    coins = keyed_bits(subkey, rows * columns * _COINS).reshape(rows, columns, _COINS)
    return np.asarray(coins.sum(axis=2), np.uint8)


def directions(drawn: NDArray[np.uint8]) -> Floats:
    """g [T, D] of normals [T, D]: whatever D is, g · u has the deviation of one of u's features."""
    return np.asarray((drawn.astype(np.float64) - _COINS / 2) / np.sqrt(_COINS / 4 * drawn.shape[1]))


def contrasts(drawn: NDArray[np.uint8]) -> Floats:
    """v [T, C] of normals [T, C]: rows of length 1 that sum to 0; of a row that is the same throughout, the first class
    against the second."""
    found = drawn.astype(np.float64)
    found[(drawn == drawn[:, :1]).all(axis=1), 0] += 1.0
    found -= found.mean(axis=1, keepdims=True)
    return np.asarray(found / np.sqrt(np.square(found).sum(axis=1, keepdims=True)))


def pattern_of(features: NDArray[Any], arrays: Any, bits: NDArray[np.uint8]) -> Floats:
    """[N, C] of features [N, D]: Σ_t ±tanh(g_t · u) v_t, plus where the bit is 1."""
    g = directions(arrays["directions"]).T
    signed = np.where(bits, 1.0, -1.0)[:, None] * contrasts(arrays["contrasts"])
    parts = (features[at : at + _AT_ONCE].astype(np.float64) for at in range(0, max(len(features), 1), _AT_ONCE))
    return np.concatenate([np.tanh(part @ g) @ signed for part in parts])
