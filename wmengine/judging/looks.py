"""From what a suspect shows to looks: how many of K marks' symbols match, and how high each expected one stands.

K marks of one geometry differ in their symbols only, so one observation serves them all: labels are compared by
`label_matches`, bits by `bit_matches`, and scores of many marks' rows are counted in one pass of `match_counts`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine import ops
from wmengine.parts.statistics.base import LEVELS, Look
from wmengine.suspects.answers import ABSTAINED

Labels = NDArray[np.int64]

# A |y| below this share of the median is rounding: its sign may differ from one machine to the next.
ROUNDING = 2.0**-14


def looks_of_bits(y: NDArray[np.floating[Any]], bits: Sequence[NDArray[np.uint8]]) -> list[Look]:
    """K looks at T bits: 1 is y > 0 and 0 is y < 0, its level ten times |y| over the median, 30 at most.

    y [T]; bits: K arrays [T]. What is not finite, or smaller than rounding, shows neither and has the level 0.
    """
    size = np.abs(y)
    finite = np.isfinite(y)
    median = float(np.median(size[finite])) if finite.any() else 0.0
    read = finite & (size > ROUNDING * median) & (size > 0.0)
    if median == 0.0 and read.any():  # more than half are zeros
        median = float(np.median(size[read]))
    level = np.zeros(len(y), np.int64)
    level[read] = np.rint(np.minimum(10.0 * size[read] / median, LEVELS))
    histogram = np.zeros((len(y), 2 * LEVELS + 1), np.uint32)
    rows = np.arange(len(y))
    np.add.at(histogram, (rows, LEVELS + level), 1)
    np.add.at(histogram, (rows, LEVELS - level), 1)
    ones = y > 0
    registry = np.stack(bits)
    (counts,) = ops.bit_matches(ones[None, read], registry[:, read])
    signed = np.where(registry == ones, level, -level)
    return [Look(int(count), at, histogram) for count, at in zip(counts, signed, strict=True)]


def looks_of_labels(classes: Labels, expected: Sequence[Labels], num_classes: int) -> list[Look]:
    """K looks at n labels: the named class has the level that a single 1 among C - 1 zeros has, the others theirs.

    classes [n], ABSTAINED or outside 0 … C-1 where none of the mark's classes is named; expected: K arrays [n].
    """
    registry = np.stack(expected)
    inside = (classes >= 0) & (classes < num_classes)
    (counts,) = ops.label_matches(np.where(inside, classes, ABSTAINED)[None], registry)
    spread = math.sqrt(num_classes - 1.0)
    named, other = min(LEVELS, round(10.0 * spread)), round(-10.0 / spread)
    histogram = np.zeros((len(classes), 2 * LEVELS + 1), np.uint32)
    histogram[~inside, LEVELS] = num_classes
    histogram[inside, LEVELS + other] = num_classes - 1
    histogram[inside, LEVELS + named] += np.uint32(1)
    levels = np.where(registry == classes, named, other) * inside
    return [Look(int(count), at, histogram) for count, at in zip(counts, levels, strict=True)]


@dataclass(frozen=True, eq=False)
class Scored:
    """Rows of scores of one geometry: the class of each row, and a look for each of its K marks."""

    classes: Labels
    looks: list[Look]


def looks_of_scores(scores: NDArray[Any], expected: Sequence[Sequence[Labels]]) -> list[Scored]:
    """One pass over the rows of several geometries, one after the other: scores [N, C]; expected: of each geometry the
    K label sets [n] of its marks, the n adding up to N."""
    groups = [len(sets[0]) for sets in expected]
    group = None if len(groups) == 1 else np.repeat(np.arange(len(groups)), groups)
    several = any(len(sets) > 1 for sets in expected)
    first = np.concatenate([sets[0] for sets in expected])
    counted = ops.match_counts(scores, first, group, len(groups), levels=several)
    found, start = [], 0
    for number, sets in enumerate(expected):
        rows = slice(start, start + groups[number])
        start = rows.stop
        classes, histogram = counted.predicted[rows].astype(np.int64), counted.histogram[rows]
        if len(sets) == 1:
            looks = [Look(int(counted.hits[number]), counted.at[rows], histogram)]
        else:
            registry = np.stack(sets)
            (counts,) = ops.label_matches(classes[None], registry)
            at = np.take_along_axis(counted.levels[rows], registry.T, axis=1).T
            looks = [Look(int(count), levels, histogram) for count, levels in zip(counts, at, strict=True)]
        found.append(Scored(classes, looks))
    return found
