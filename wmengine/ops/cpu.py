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
from wmengine.ops.matches import check_integers, plain
from wmengine.ops.matches import label_matches as label_matches
from wmengine.ops.matches import pack_bits as pack_bits
from wmengine.ops.reference import CARRIERS, PROJECTIONS, MatchCounts

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
        [(weight.ctypes.data, 0, filters, size, 1, key)],
        CARRIERS.index(carrier),
        PROJECTIONS.index(projection),
        total,
        scale,
        0,
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
_SCORES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1}
_BFLOAT16 = 2


def check_matching(outputs: Any, expected: Any, group: Any, groups: int) -> None:
    """TypeError or ValueError unless these are [N, C], [N] and [N] or None, labels and groups integers."""
    if outputs.ndim != 2 or expected.ndim != 1 or len(expected) != len(outputs):
        shapes = f"{tuple(outputs.shape)} and {tuple(expected.shape)}"
        raise ValueError(f"outputs must be [N, C] and expected [N], not {shapes}")
    if outputs.shape[1] < 1:
        raise ValueError("outputs must have at least one class")
    check_integers("expected", expected)
    check_count("groups", groups)
    if group is not None:
        check_integers("group", group)
        if tuple(group.shape) != tuple(expected.shape):
            raise ValueError(f"group must be [{len(expected)}] as expected is, not {tuple(group.shape)}")


def match_counts(
    outputs: ArrayLike,
    expected: ArrayLike,
    group: ArrayLike | None = None,
    groups: int = 1,
    *,
    levels: bool = False,
    bfloat16: bool = False,
) -> MatchCounts:
    """See :func:`wmengine.ops.match_counts`. `bfloat16`: outputs are the bits of such numbers, as uint16."""
    answers, labels = np.asarray(outputs), np.asarray(expected)
    of = None if group is None else np.asarray(group)
    check_matching(answers, labels, of, groups)
    if of is not None and of.size and (of.min() < 0 or of.max() >= groups):
        raise ValueError(f"group must hold 0 to {groups - 1}, not {of.min()} to {of.max()}")
    if answers.dtype == np.float64:
        return reference.match_counts(answers, labels, of, groups, levels=levels)
    stored = _BFLOAT16 if bfloat16 and answers.dtype == np.uint16 else _SCORES.get(answers.dtype)
    if stored is None:
        raise TypeError(f"outputs must be float32, float16 or float64, not {answers.dtype}")
    if labels.dtype == np.uint64:
        labels = np.minimum(labels, np.uint64(2**63 - 1))  # a class that no network has stays one
    answers, labels = plain(answers), plain(labels, np.int64)
    of = None if of is None else plain(of, np.int64)
    rows, classes = answers.shape
    found = MatchCounts(
        predicted=np.empty(rows, dtype=np.int32),
        at=np.empty(rows, dtype=np.int8),
        histogram=np.empty((rows, 2 * reference.MOST_LEVEL + 1), dtype=np.uint32),
        hits=np.empty(groups, dtype=np.int32),
        invalid=np.empty(groups, dtype=np.int32),
        levels=np.empty((rows, classes), dtype=np.int8) if levels else None,
    )
    _cpu.match_counts(
        answers.ctypes.data,
        stored,
        rows,
        classes,
        labels.ctypes.data,
        0 if of is None else of.ctypes.data,
        groups,
        *[0 if array is None else array.ctypes.data for array in found],
    )
    return found
