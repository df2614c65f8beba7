"""Suspects whose classes stand in another order than the mark's: which order it is, and what looking for it costs.

A thief who renumbers the classes keeps the mark and hides it. An order estimated on labelled task data that hold no
trigger is free: it knows nothing of the triggers' labels, so that given the order these are still uniform. An order
that makes the triggers' own matches most costs as much as trying all orders does (Bonferroni): the p-value is
multiplied by their number, C! at most.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Interprets, Pools, inputs_of
from wmengine.suspects.adapters import Adapter

CLASSES = ("same", "any")
MAXIMUM_CLASSES = 1 << 24  # in an order, which takes eight bytes for each

_AS_BYTES = Adapter(scaling="bytes", dtype="uint8")

Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CleanData:
    """Labelled inputs of the task: uint8 or floats of the recorded range [M, C, ...], and what they are, int64 [M]."""

    inputs: NDArray[Any]
    labels: Labels


def check_clean(clean: Any, mark: Watermark) -> CleanData:
    """(inputs, labels) as CleanData for a black-box mark.

    Raises TypeError or ValueError, naming `clean`, for what is no labelled data of the mark's task, or holds triggers.
    """
    try:
        inputs, labels = (np.asarray(part) for part in clean)
    except (TypeError, ValueError):
        raise TypeError("clean must be a pair of arrays, inputs and labels") from None
    if isinstance(mark.preset.source, Pools):
        raise ValueError(f"{mark.name} finds the order of the classes by its own pool: leave clean= out")
    if isinstance(mark.preset.source, Interprets):
        raise ValueError(f"clean data are for marks of one answer a symbol, and {mark.name} asks for more")
    if "value_range" not in mark.parameters:
        raise ValueError(f"clean data are for marks of one floating input, and {mark.name} takes others")
    (given,) = inputs_of(mark.parameters).values()
    shape, classes = given.shape, int(mark.parameters["num_classes"])
    if inputs.dtype.kind != "f" and inputs.dtype != np.uint8:
        raise TypeError(f"clean's inputs must be uint8 or floats, and they are {inputs.dtype}")
    if inputs.shape[1:] != shape or len(inputs) == 0:
        raise ValueError(
            f"clean's inputs must be [M, {', '.join(map(str, shape))}] as the triggers are, and they are "
            f"{list(inputs.shape)}"
        )
    if labels.dtype.kind not in "iu" or labels.shape != inputs.shape[:1]:
        raise ValueError(
            f"clean's labels must be {len(inputs)} integers, and they are {labels.dtype}{list(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"clean's labels must be from 0 to {classes - 1}, and are {labels.min()} to {labels.max()}")
    images = inputs
    if inputs.dtype.kind == "f":
        inputs = inputs.astype(np.float32)
        if not np.isfinite(inputs).all():
            raise ValueError("clean's inputs hold NaN or Inf")
        images = _AS_BYTES.recorded_inputs(inputs, mark.parameters["value_range"])
    known = {row.tobytes() for row in mark.arrays["triggers"]}
    if any(row.tobytes() in known for row in images):
        raise ValueError("clean's inputs hold a trigger: an order estimated on triggers is not free")
    return CleanData(inputs, labels.astype(np.int64))


def best_order(predicted: Labels, labels: Labels, num_classes: int) -> tuple[Labels, int]:
    """(order, matches): order[c] is the class that the suspect's class c becomes, a permutation with most matches.

    Answers outside 0 … C−1, abstentions too, match nothing. Of equally good orders the one that keeps most classes
    where they are; the assignment is solved by `scipy.optimize.linear_sum_assignment` in O(n³), n the classes that are
    answered or meant: the others stay. Raises ValueError for more classes than MAXIMUM_CLASSES.
    """
    from scipy.optimize import linear_sum_assignment  # a third of a second, and most verdicts do without it

    if num_classes > MAXIMUM_CLASSES:
        raise ValueError(f"no order of {num_classes} classes is looked for, only of {MAXIMUM_CLASSES} at most")
    inside = (predicted >= 0) & (predicted < num_classes)
    named = np.union1d(predicted[inside], labels[inside])
    counts = np.zeros((len(named), len(named)), np.int64)
    np.add.at(counts, (np.searchsorted(named, predicted[inside]), np.searchsorted(named, labels[inside])), 1)
    # One match outweighs every class that stays.
    worth = counts * (len(named) + 1) + np.eye(len(named), dtype=np.int64)
    rows, places = linear_sum_assignment(worth, maximize=True)
    order = np.arange(num_classes)
    order[named] = named[places]
    return order, int(counts[rows, places].sum())


def reorder(predicted: Labels, order: Labels) -> Labels:
    """Predictions as the classes that they stand for; what is no class stays what it is."""
    inside = (predicted >= 0) & (predicted < len(order))
    return np.where(inside, order[np.where(inside, predicted, 0)], predicted)


def log10_orders(num_classes: int, used: int) -> float:
    """log10 of the number of ways to rename `used` of C classes, C! / (C − used)!, which is C! where all are used.

    What a suspect answers does not depend on the labels, so the number of classes it uses may be looked at for free.
    """
    if not 0 <= used <= num_classes:
        raise ValueError(f"used must be from 0 to {num_classes}, and it is {used}")
    return max(0.0, math.lgamma(num_classes + 1.0) - math.lgamma(num_classes - used + 1.0)) / math.log(10.0)


def used_classes(predicted: Labels, num_classes: int) -> int:
    """How many of the classes 0 … C−1 a suspect answers with."""
    return len(np.unique(predicted[(predicted >= 0) & (predicted < num_classes)]))


def order_of_names(names: Sequence[str], mark: Watermark) -> Labels | None:
    """For each class of a suspect that calls its classes so the mark's of that name; None where the names are others.

    This is free: neither the mark's names, which are part of its identity, nor the suspect's depend on its symbols.
    """
    known = mark.parameters.get("class_names") or []
    called = [unicodedata.normalize("NFC", name) for name in names]
    return np.array([known.index(name) for name in called]) if known and sorted(called) == sorted(known) else None


def names_given(labels: Sequence[str] | None, mark: Watermark) -> bool:
    """Whether whoever verifies has said himself in which order the classes' names stand, and not the mark."""
    return labels is not None and list(labels) != mark.parameters.get("class_names")
