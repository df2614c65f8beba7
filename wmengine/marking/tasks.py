"""What an owner's arrays say of a task, with no library of networks: ranges of values, samples and what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.parts.fields import MAX_CLASSES
from wmengine.suspects.answers import to_array
from wmengine.suspects.base import Signature

ONE = "input"  # what a single input is called that has no name


def ranges_of(sample: NDArray[Any], value_range: Any) -> list[tuple[float, float]]:
    """[lo, hi] of every channel (axis 1), from the caller or from the sample; of integers one pair for all."""
    floating = sample.dtype.kind == "f"
    channels = sample.shape[1] if floating else 1
    if value_range is None:
        rows = (sample.swapaxes(0, 1) if floating else sample).reshape(channels, -1)
        return list(zip(rows.min(axis=1).tolist(), rows.max(axis=1).tolist(), strict=True))
    try:
        with np.errstate(over="ignore"):  # beyond float32 is Inf, which is refused
            ends = np.asarray(value_range, dtype=np.float32 if floating else np.int64)
    except (TypeError, ValueError, OverflowError):  # what NumPy says of a ragged list is about NumPy
        ends = np.empty(0)
    if ends.shape not in ((2,), (channels, 2)):
        each = f" or one pair for each of the {channels} channels" if floating else ""
        raise ValueError(f"value_range must be (lo, hi){each}, and it is {value_range!r:.100}")
    return [(low, high) for low, high in np.broadcast_to(ends, (channels, 2)).tolist()]


def samples_of(
    given: Any, signature: Signature, single: bool, num_classes: int | None
) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64] | None, NDArray[np.float64] | None]:
    """The owner's samples by name, and their labels or, of a regression, targets, if there are any; nothing for None.

    Raises ValueError or TypeError for what is not shaped as the sample.
    """
    if given is None:
        return {}, None, None
    inputs, labels = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if single == isinstance(inputs, Mapping) or (not single and set(inputs) != set(signature)):
        raise TypeError("samples must be what the sample is: a tensor, or a dict with the same names")
    rows: dict[str, NDArray[Any]] = {}
    for name, values in ({ONE: inputs} if single else dict(inputs)).items():
        array, shape = to_array(values), signature[name].shape
        if array is None or array.shape[1:] != shape or len(array) == 0:
            raise ValueError(f"samples must be [n, {', '.join(map(str, shape))}], as the sample is")
        rows[name] = array
    if labels is None:
        return rows, None, None
    truth, count, most = to_array(labels), len(next(iter(rows.values()))), (num_classes or MAX_CLASSES) - 1
    if truth is not None and truth.dtype.kind == "f" and truth.shape in ((count,), (count, 1)):
        if not np.isfinite(truth).all():
            raise ValueError("the targets of samples hold NaN or Inf")
        return rows, None, truth.reshape(count).astype(np.float64)
    if truth is None or truth.dtype.kind not in "iu" or truth.shape != (count,):
        raise ValueError(f"the labels of samples must be {count} class numbers, or targets as floats")
    if not 0 <= truth.min() <= truth.max() <= most:
        raise ValueError(
            f"the labels of samples must be from 0 to {most} (targets are floats), and they are {truth.min()} to "
            f"{truth.max()}"
        )
    return rows, truth.astype(np.int64), None
