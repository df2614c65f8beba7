"""Bits in the weights: carrier × keyed projection → y [T], over one weight or many, found again by shape and order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine import ops
from wmengine.facts import fact
from wmengine.identity.subkeys import philox_key
from wmengine.ops.reference import CARRIERS, PROJECTIONS
from wmengine.parts.base import Draw, Drawn, Layout, Need, Observation, Observations, Parameters, Task, inputs_of
from wmengine.parts.fields import MAX_DIMENSION, canonical_integer, canonical_shape, integer, one_of, shape
from wmengine.parts.matching import match_tensors
from wmengine.suspects.base import Suspect, Tensor

MARKED = ("all", "widest")
UNIT_CARRIERS = ("unit_filters", "unit_filter_mean")


@dataclass(frozen=True)
class Weights:
    """carrier: what is read of a weight [O, ...], as it stands after folding the normalisation behind it; projection:
    "sketch", "rademacher" or "gaussian"; marked: "all" weights, the "widest" (most values per filter, the first of
    equals), or an index in the order of execution."""

    carrier: str
    projection: str
    marked: str | int = "all"

    needs = Need.TENSORS
    fields = ("carrier", "projection", "carriers", "carrier_indices")

    def __post_init__(self) -> None:
        one_of("carrier", self.carrier, CARRIERS)
        one_of("projection", self.projection, PROJECTIONS)
        if isinstance(self.marked, str):
            one_of("marked", self.marked, MARKED)
        else:
            integer("marked", self.marked, 0, MAX_DIMENSION)

    def describe(self, task: Task, total: int) -> Parameters:
        """carriers: the shapes of the marked weights; carrier_indices: their places among all of the task's."""
        shapes, allowed = task.weights()
        every = [shape(f"shapes[{index}]", sizes, least=2) for index, sizes in enumerate(shapes)]
        if not allowed:
            raise ValueError("it marks the weights of convolutions and linear layers, and this network trains none")
        if self.marked == "all":
            indices = allowed
        elif self.marked == "widest":
            indices = [max(allowed, key=lambda index: (math.prod(every[index][1:]), -index))]
        else:
            indices = [integer("marked", self.marked, 0, len(every) - 1)]
            if indices[0] not in allowed:
                raise ValueError(f"it is to mark weight {indices[0]}, which is not trained")
        return {
            "carrier": self.carrier,
            "projection": self.projection,
            "carriers": [every[index] for index in indices],
            "carrier_indices": indices,
        }

    def check(self, parameters: Parameters, total: int) -> None:
        one_of("carrier", parameters["carrier"], CARRIERS)
        one_of("projection", parameters["projection"], PROJECTIONS)
        carriers, indices = parameters["carriers"], parameters["carrier_indices"]
        if type(carriers) is not list or type(indices) is not list or not carriers or len(carriers) != len(indices):
            raise ValueError("carriers and carrier_indices must be lists of the same length, at least 1")
        for position, (sizes, index) in enumerate(zip(carriers, indices, strict=True)):
            canonical_shape(f"carriers[{position}]", sizes, least=2)
            canonical_integer(f"carrier_indices[{position}]", index, 0, MAX_DIMENSION)
        if any(second <= first for first, second in pairwise(indices)):
            raise ValueError(f"carrier_indices must increase, and they are {indices}")

    def layout(self, parameters: Parameters, total: int) -> Layout:
        return {"carrier_keys": ("uint64", (len(parameters["carriers"]),))}

    def draw(self, subkey: Draw, parameters: Parameters, total: int) -> dict[str, NDArray[Any]]:
        """ "carrier_keys" uint64 [L]: the Philox key of each marked weight's projection."""
        keys = [philox_key(subkey("projection", str(index))) for index in parameters["carrier_indices"]]
        return {"carrier_keys": np.array(keys, dtype=np.uint64)}

    def observe(self, mark: Drawn, suspect: Suspect, total: int) -> Observations:
        """y [T] for every pairing of carriers and the suspect's tensors that keeps their order."""
        parameters = mark.parameters
        tensors = suspect.tensors(inputs_of(parameters))
        shapes = [tuple(sizes) for sizes in parameters["carriers"]]
        matching = match_tensors(shapes, tensors, parameters["carrier_indices"])
        facts = [*suspect.facts, *matching.facts]
        if matching.found == 0:
            return Observations(facts=[*facts, fact("no_carrier")])
        projections = _Projections(mark, tensors, total)
        share = 1.0 / len(matching.tries)
        return Observations([Observation(projections.sum(pairing), share) for pairing in matching.tries], facts)


class _Projections:
    """The projection of each (carrier, tensor) pair, computed once; projections are linear, so a pairing is a sum."""

    def __init__(self, mark: Drawn, tensors: list[Tensor], total: int) -> None:
        self._mark, self._tensors, self._total = mark, tensors, total
        self._known: dict[tuple[int, int], NDArray[np.float32]] = {}

    def sum(self, pairing: tuple[int | None, ...]) -> NDArray[np.float64]:
        y = np.zeros(self._total)
        for carrier, tensor in enumerate(pairing):
            if tensor is not None:
                y += self._project(carrier, tensor)
        return y

    def _project(self, carrier: int, tensor: int) -> NDArray[np.float32]:
        if (carrier, tensor) not in self._known:
            parameters, weight = self._mark.parameters, self._tensors[tensor]
            self._known[carrier, tensor] = ops.carrier_projection(
                folded(weight.values, weight.factors, parameters["carrier"]),
                int(self._mark.arrays["carrier_keys"][carrier]),
                self._total,
                parameters["carrier"],
                parameters["projection"],
            )
        return self._known[carrier, tensor]


def folded(values: Any, factors: Any, carrier: str) -> Any:
    """Filters [O, ...] times the factors [O] of the normalisation behind them, an array or a tensor.

    Unit filters lose all of a factor but its sign.
    """
    if factors is None:
        return values
    if carrier in UNIT_CARRIERS:
        factors = np.sign(factors) if isinstance(factors, np.ndarray) else factors.detach().sign()
    return values * factors.reshape(-1, *[1] * (values.ndim - 1))
