"""Symmetries: other weights that compute the same function, by permuting, rescaling or flipping hidden channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.attacks.channels import Group, Use, channel_groups, indices
from wmengine.attacks.files import cast, initializers, set_initializers

Values = dict[str, NDArray[np.float64]]


def permute(model: Any, random: np.random.Generator) -> None:
    """Give the hidden channels another order, drawn for each group of channels."""

    def change(group: Group, values: Values) -> None:
        order = random.permutation(group.channels)
        for name, axis in dict.fromkeys((use.tensor, use.axis) for use in group.uses):
            array = values[name]
            values[name] = array.take(indices(order, array.shape[axis] // group.channels), axis)

    _change(model, "permuted", change)


def rescale(model: Any, random: np.random.Generator, low: float, high: float) -> None:
    """Multiply hidden channels by factors, log-uniform between low and high, and take them out again behind.

    A filter before a BatchNorm is multiplied by t too, where the variance can take that up: t²·(var + ε) − ε > 0.
    """
    if not 0.0 < low <= high < np.inf:
        raise ValueError(f"low and high must be factors above 0, the smaller first, and they are {low!r} and {high!r}")

    def change(group: Group, values: Values) -> None:
        factors = np.exp(random.uniform(np.log(low), np.log(high), group.channels))
        for use in group.uses:
            if use.effect == "variance":
                variances = values[use.tensor].reshape(group.channels, -1).min(axis=1)
                factors[factors**2 * (variances + use.epsilon) <= use.epsilon] = 1.0
        _scale(group, values, factors)

    _change(model, "rescaled", change)


def flip(model: Any, random: np.random.Generator) -> None:
    """Change the signs of hidden channels, each with chance 1/2, where a BatchNorm's gamma or an odd activation lets
    that be undone behind."""

    def change(group: Group, values: Values) -> None:
        _scale(group, values, random.choice([-1.0, 1.0], group.channels))

    _change(model, "flipped", change)


def _change(model: Any, what: str, change: Callable[[Group, Values], None]) -> None:
    """Apply a change to each group of channels, in float64, and put the values back in their own type."""
    groups, own = channel_groups(model, what), initializers(model)
    names = {use.tensor for group in groups for use in group.uses}
    values: Values = {name: own[name].astype(np.float64) for name in names}
    for group in groups:
        change(group, values)
    set_initializers(model, {name: cast(name, array, own[name], own[name].dtype) for name, array in values.items()})


def _scale(group: Group, values: Values, factors: NDArray[np.float64]) -> None:
    for use in group.uses:
        array = np.moveaxis(values[use.tensor], use.axis, -1)
        array[...] = _scaled(use, array, factors.repeat(array.shape[-1] // group.channels))


def _scaled(use: Use, array: NDArray[np.float64], factors: NDArray[np.float64]) -> NDArray[np.float64]:
    if use.effect == "multiply":
        return array * factors
    if use.effect == "divide":
        return array / factors
    if use.effect == "sign":
        return array * np.sign(factors)
    if use.effect == "variance":
        return np.where(factors**2 == 1.0, array, factors**2 * (array + use.epsilon) - use.epsilon)
    return array
