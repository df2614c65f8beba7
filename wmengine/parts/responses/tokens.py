"""Probes of models that read tokens: the owner's own rows as they are, and splices, which begin as one and end as
another. A mean of two tokens is some third one, and says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.parts.triggers.tokens import MAX_TOKEN, check_tokens
from wmengine.suspects.base import Signature

Tokens = NDArray[np.int32]


def are_tokens(inputs: Signature) -> bool:
    """Whether the first of a model's inputs are integers [L]. Raises ValueError where the others then fit none."""
    first = next(iter(inputs.values()))
    if len(first.shape) != 1 or not first.dtype.startswith(("int", "uint")):
        return False
    check_tokens(inputs)
    return True


def stacked(samples: Sequence[NDArray[Any]]) -> Tokens:
    """Rows of tokens and of what goes with them, masks and the like, as int32 [n, inputs, L]; ValueError for others."""
    if len({len(rows) for rows in samples}) > 1:
        raise ValueError("its probes have a mask each: give samples with as many rows of every input")
    found = np.stack(samples, axis=1)
    if (np.rint(found) != found).any() or found.max() > MAX_TOKEN or found.min() < -MAX_TOKEN:
        raise ValueError(f"its probes are tokens and masks, whole numbers up to {MAX_TOKEN}, and samples hold others")
    return np.asarray(found, np.int32)


def apart(probes: Tokens, inputs: Signature) -> dict[str, NDArray[Any]]:
    """What `stacked` undoes: each input as the model's own loop feeds it."""
    return {name: probes[:, place].astype(spec.dtype) for place, (name, spec) in enumerate(inputs.items())}


def splices(rows: Tokens, first: NDArray[np.int64], second: NDArray[np.int64], random: np.random.Generator) -> Tokens:
    """Row `first` up to a place drawn at random, row `second` from there on, masks alike; neither is cut within its
    padding, the end in which it is the same throughout."""
    length = rows.shape[2]
    ends = np.minimum.accumulate((rows == rows[..., -1:]).all(axis=1)[:, ::-1], axis=1)
    filled = length - ends.sum(axis=1)
    cut = random.integers(1, np.maximum(np.minimum(filled[first], filled[second]), 1), endpoint=True)
    return np.where(np.arange(length) < cut[:, None, None], rows[first], rows[second])
