"""Pruning: what is small is set to zero, single weights or whole channels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.attacks.channels import channel_groups, indices
from wmengine.attacks.files import initializers, set_initializers

Weights = dict[str, NDArray[np.float32]]


def prune(weights: Weights, random: np.random.Generator, share: float, per_layer: bool) -> None:
    """Zero the smallest weights, exactly `share` of all together, or with per_layer of each tensor."""
    for part in [{name: array} for name, array in weights.items()] if per_layer else [weights]:
        sizes = np.concatenate([np.abs(array).ravel() for array in part.values()])
        kept = np.ones(len(sizes), bool)
        kept[_smallest(sizes, share)] = False
        ends = np.cumsum([array.size for array in part.values()])[:-1]
        for array, keep in zip(part.values(), np.split(kept, ends), strict=True):
            array[~keep.reshape(array.shape)] = 0.0


def prune_filters(model: Any, random: np.random.Generator, share: float) -> None:
    """Zero the channels of the smallest L1 norm over all that produces them, exactly `share` of each group of channels.

    Channels that a residual stream ties together are one group, and fall together. Filter, bias, gamma and beta go.
    """
    values = initializers(model)
    changed: dict[str, NDArray[Any]] = {}
    for group in channel_groups(model, "permuted"):
        made = {(use.tensor, use.axis) for use in group.uses if use.effect == "multiply"}
        norms = np.zeros(group.channels)
        for name, axis in made:
            if values[name].ndim > 1:
                sizes = np.abs(np.moveaxis(values[name], axis, 0).astype(np.float64))
                norms += sizes.reshape(group.channels, -1).sum(axis=1)
        small = _smallest(norms, share)
        for name, axis in made:
            changed[name] = array = changed.get(name, values[name].copy())
            np.moveaxis(array, axis, 0)[indices(small, array.shape[axis] // group.channels)] = 0.0
    set_initializers(model, changed)


def _smallest(sizes: NDArray[Any], share: float) -> NDArray[np.int64]:
    """The indices of exactly that share of the sizes; among equal ones those that come first."""
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must be between 0 and 1, and it is {share!r}")
    count = round(share * len(sizes))
    if count in (0, len(sizes)):
        return np.arange(count)
    bar = np.partition(sizes, count - 1)[count - 1]
    below, ties = np.flatnonzero(sizes < bar), np.flatnonzero(sizes == bar)
    return np.concatenate([below, ties[: count - len(below)]])
