"""NumPy in, NumPy out: the fronts of the compiled CPU operators, which check what they are given.

float32 runs compiled, float16 is widened to it (match_counts reads it as it is), float64 goes to
:mod:`wmengine.ops.reference`. Comparisons of labels and of bits are in :mod:`wmengine.ops.matches`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wmengine import _cpu
from wmengine.ops import reference
from wmengine.ops.matches import bit_matches as bit_matches
from wmengine.ops.matches import label_matches as label_matches
from wmengine.ops.matches import pack_bits as pack_bits
from wmengine.ops.matches import plain
from wmengine.ops.reference import CARRIERS, PROJECTIONS

Floats = NDArray[np.floating[Any]]

# What float arrays the compiled operators take, and float64, which the reference computes.
_NATIVE = (np.dtype(np.float32), np.dtype(np.float16))


def check_key(key: int) -> int:
    """`key` as an int, 0 ≤ key < 2⁶⁴; TypeError or ValueError otherwise."""
    if isinstance(key, bool) or not isinstance(key, (int, np.integer)):
        raise TypeError(f"key must be an int of 64 bits, not {type(key).__name__}")
    if not 0 <= int(key) < 1 << 64:
        raise ValueError(f"key must be 0 <= key < 2**64, not {key}")
    return int(key)


def check_count(name: str, count: int, least: int = 1) -> int:
    """An int of at least `least`; TypeError or ValueError naming the argument otherwise."""
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)):
        raise TypeError(f"{name} must be an int, not {type(count).__name__}")
    if count < least:
        raise ValueError(f"{name} must be at least {least}, not {count}")
    return int(count)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """`value`, one of `choices`; ValueError listing them otherwise."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    return value


def check_vector(name: str, values: ArrayLike) -> Floats:
    """A one-dimensional float array, contiguous, float32 or float64."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, not shape {array.shape}: flatten it first")
    if array.dtype in _NATIVE:
        return plain(array, np.float32)
    if array.dtype != np.float64:
        raise TypeError(f"{name} must be float32, float16 or float64, not {array.dtype}")
    return plain(array)


def _sums(weight: Floats, key: int, total: int, carrier: str, projection: str, scale: float) -> NDArray[np.float32]:
    filters = weight.shape[0]
    size = weight.size // filters if filters else 0
    inverse_norms = np.empty(filters, dtype=np.float32)
    y = np.empty(total, dtype=np.float32)
    _cpu.carrier_projection(
        [(weight.ctypes.data, 0, filters, size, key)],
        CARRIERS.index(carrier),
        PROJECTIONS.index(projection),
        total,
        scale,
        inverse_norms.ctypes.data,
        y.ctypes.data,
    )
    return y


def project(values: ArrayLike, key: int, total: int, projection: str) -> Floats:
    """scale · P(key)·w of w[M] → [total], any projection; scaled as :func:`wmengine.ops.project` says."""
    w, key, total = check_vector("values", values), check_key(key), check_count("total", total)
    scale = reference.projection_scale(total, w.size, projection)
    if w.dtype == np.float64:
        return np.asarray(scale * reference.projection_sums(w, key, total, projection))
    return _sums(w.reshape(1, -1), key, total, "flat", projection, scale)


def project_adjoint(gradient: ArrayLike, key: int, count: int, projection: str, out: Floats | None = None) -> Floats:
    """The transpose of :func:`project`: g[total] → [count]; added to `out` where that is given."""
    g, key, count = check_vector("gradient", gradient), check_key(key), check_count("count", count, least=0)
    check_count("the number of symbols in gradient", g.size)
    if out is not None and (
        out.shape != (count,) or out.dtype != g.dtype or not out.flags.c_contiguous or not out.flags.writeable
    ):
        raise ValueError(f"out must be a writable contiguous {g.dtype} array of shape ({count},)")
    scale = reference.projection_scale(g.size, count, projection)
    if g.dtype == np.float64:
        exact = np.asarray(scale * reference.projection_adjoint(g, key, count, projection))
        if out is None:
            return exact
        out += exact
        return out
    result = np.empty(count, dtype=np.float32) if out is None else out
    _cpu.projection_adjoint(
        g.ctypes.data,
        g.size,
        count,
        key,
        PROJECTIONS.index(projection),
        scale,
        out is not None,
        result.ctypes.data,
    )
    return result


def carrier_projection(weight: ArrayLike, key: int, total: int, carrier: str, projection: str) -> NDArray[np.float32]:
    """P(key)·v, unscaled, of what `carrier` reads from one weight [filters, …] → float32[total]."""
    array = np.asarray(weight)
    if array.ndim < 1:
        raise ValueError("weight must have filters on its first axis, not be a scalar")
    if array.dtype.kind != "f":
        raise TypeError(f"weight must be floating, not {array.dtype}")
    check_choice("carrier", carrier, CARRIERS)
    check_choice("projection", projection, PROJECTIONS)
    values = plain(array, np.float32)
    return _sums(values, check_key(key), check_count("total", total), carrier, projection, 1.0)


# What match_counts reads as it is: 16-bit floats by their bits, so bfloat16, which NumPy lacks, may come as uint16.
_SCORES = {"float32": 0, "float16": 1, "bfloat16": 2}


def match_counts(
    outputs: ArrayLike, expected: ArrayLike, *, bfloat16: bool = False
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Count, for S suspects and K label sets, the rows of outputs[S, N, C] whose argmax is expected[K, N].

    Returns (counts int32[S, K], invalid int32[S]): a row that holds NaN or Inf never matches and is counted as invalid;
    ties go to the lowest class. `bfloat16`: outputs are the bits of such numbers, as uint16. Raises ValueError where
    the shapes do not fit together, TypeError for other types.
    """
    answers, labels = np.asarray(outputs), np.asarray(expected)
    if answers.ndim != 3 or labels.ndim != 2 or answers.shape[1] != labels.shape[1]:
        raise ValueError(f"outputs must be [S, N, C] and expected [K, N], not {answers.shape} and {labels.shape}")
    if answers.shape[2] < 1:
        raise ValueError("outputs must have at least one class")
    if labels.dtype.kind not in "iu":
        raise TypeError(f"expected must hold integer labels, not {labels.dtype}")
    if answers.dtype == np.float64:
        return reference.match_counts(answers, labels)
    scores = _SCORES.get("bfloat16" if bfloat16 and answers.dtype == np.uint16 else answers.dtype.name)
    if scores is None:
        raise TypeError(f"outputs must be float32, float16 or float64, not {answers.dtype}")
    if labels.dtype == np.uint64:
        labels = np.minimum(labels, np.uint64(2**63 - 1))  # a class that no network has stays one
    answers = plain(answers)
    labels = plain(labels, np.int64)
    suspects, queries, classes = answers.shape
    counts = np.empty((suspects, labels.shape[0]), dtype=np.int32)
    invalid = np.empty(suspects, dtype=np.int32)
    _cpu.match_counts(
        answers.ctypes.data,
        scores,
        suspects,
        queries,
        classes,
        labels.ctypes.data,
        labels.shape[0],
        counts.ctypes.data,
        invalid.ctypes.data,
    )
    return counts, invalid
