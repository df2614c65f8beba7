"""Bits in the signs of scales that passports give: γ_o = <W_o, p>, read from the filters that a file holds.

Fan, Ng, Chan: "Rethinking deep neural network ownership verification", NeurIPS 2019, the passport function: a
normalisation's scale is γ = Avg(W ∗ P), the average over positions of a convolution of the weight with a passport P,
and its shift the same of a second passport. A convolution is linear, so that γ_o = <W_o, p> with p the average patch of
P. Theirs are pictures, or what these make of them inside a network; ours draws p itself, standard normal, from the key,
so that nothing that scoring reads is chosen.

What is read of filter o is y_o = <F_o / ‖F_o‖, p>, F_o as it stands after folding the normalisation behind it. Scaling
a filter, folding, and turning (W, γ, μ) to −(W, γ, μ) change nothing of it, and where that γ is positive its sign is
that of the paper's γ_o. Given the suspect y depends on p alone, and bits are drawn apart from p: the null is exact.

Where a network's own γ is <W_o, p>, as `deepipr_v1` ships it, whoever writes γ into a normalisation or folds it into
the filter makes F_o = γ_o·W_o and y_o = |γ_o|: its sign is gone, and nothing in the function keeps it. So `deepipr_v1`
survives only while passports are shipped as such. The private kinds do not have this weakness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine import ops
from wmengine.ops.reference import unit_rows
from wmengine.parts.base import Draw, Drawn, Layout, Need, Observations, Parameters, Task
from wmengine.parts.fields import MAX_DIMENSION, integer
from wmengine.parts.sources.weights import Array, Weights, folded, observed
from wmengine.suspects.base import Suspect, Tensor

_WEIGHTS = Weights(carrier="unit_filters", projection="gaussian")


@dataclass(frozen=True)
class Passports:
    """marked: "all" trained weights with a normalisation right behind them, or some of their places in the order of
    execution. Bits are spread evenly over the channels of all of them."""

    marked: str | tuple[int, ...] = "all"

    needs = Need.TENSORS
    fields = ("carriers", "carrier_indices")

    def __post_init__(self) -> None:
        if isinstance(self.marked, str) and self.marked != "all":
            raise ValueError(f'marked must be "all" or places of weights, and it is {self.marked!r}')
        for place in () if isinstance(self.marked, str) else self.marked:
            integer("marked", place, 0, MAX_DIMENSION)

    def describe(self, task: Task, total: int) -> Parameters:
        shapes, _ = task.weights()
        normalised = task.normalised()
        places = normalised if isinstance(self.marked, str) else sorted({int(place) for place in self.marked})
        strange = [place for place in places if place not in normalised]
        if strange:
            raise ValueError(
                f"it is to mark weight {strange[0]}, which is not trained or no normalisation is behind it"
            )
        return {"carriers": [list(shapes[place]) for place in places], "carrier_indices": list(places)}

    def check(self, parameters: Parameters, total: int) -> None:
        _WEIGHTS.check({**parameters, "carrier": _WEIGHTS.carrier, "projection": _WEIGHTS.projection}, total)
        channels = sum(sizes[0] for sizes in parameters["carriers"])
        if channels < total:
            raise ValueError(f"{channels} channels cannot hold {total} bits: ask for fewer with bits=")

    def layout(self, parameters: Parameters, total: int) -> Layout:
        return _WEIGHTS.layout(parameters, total)

    def draw(self, subkey: Draw, parameters: Parameters, total: int) -> dict[str, NDArray[Any]]:
        """ "carrier_keys" uint64 [L]: the Philox keys of each marked weight's passports."""
        return _WEIGHTS.draw(subkey, parameters, total)

    def observe(self, mark: Drawn, suspect: Suspect, total: int) -> Observations:
        """y [T] for every pairing of carriers and the suspect's tensors that keeps their order."""
        carriers = mark.parameters["carriers"]
        passports = [scales for scales, _ in passports_of(mark)]
        chosen = marked_channels(total, sum(sizes[0] for sizes in carriers))

        def part(carrier: int, values: Array, factors: Array | None) -> NDArray[Any]:
            return read(Tensor(values, "", factors), passports[carrier])

        def whole(parts: Sequence[NDArray[Any] | None]) -> NDArray[np.float64]:
            shown = [np.zeros(sizes[0]) if part is None else part for sizes, part in zip(carriers, parts, strict=True)]
            return np.concatenate(shown)[chosen]

        return observed(mark, suspect, part, whole)


def passports_of(mark: Drawn) -> list[NDArray[np.float32]]:
    """The average patches [2, M] of each marked weight [O, ...] of M values a filter: that of the scale's passport and
    that of the shift's, rows 0 and 1 of the keyed Gaussian matrix."""
    found = []
    for sizes, key in zip(mark.parameters["carriers"], mark.arrays["carrier_keys"], strict=True):
        count = int(np.prod(sizes[1:]))
        rows = [ops.project_adjoint(row, int(key), count, "gaussian") for row in np.eye(2, dtype=np.float32)]
        found.append(np.stack(rows) * np.float32(np.sqrt(count)))
    return found


def marked_channels(total: int, channels: int) -> NDArray[np.int64]:
    """Which of all marked weights' channels hold the bits [T], evenly spread."""
    return np.arange(total, dtype=np.int64) * channels // total


def read(tensor: Tensor, passport: NDArray[Any]) -> NDArray[np.float64]:
    """y [O] of one weight: each unit filter, as it stands after folding, times the passport's average patch [M]."""
    with np.errstate(all="ignore"):  # a stranger's weights may be anything; what is not finite is a miss
        filters, _ = unit_rows(folded(*tensor.read(), _WEIGHTS.carrier))
        return np.asarray(filters @ passport.astype(np.float64), np.float64)
