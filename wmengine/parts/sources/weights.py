"""Bits in the weights: carrier × keyed projection → y [T], over one weight or many, found again by shape and order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wmengine import ops
from wmengine.facts import fact
from wmengine.identity.subkeys import philox_key
from wmengine.ops.reference import CARRIERS, PROJECTIONS
from wmengine.parts.base import Draw, Drawn, Layout, Need, Observation, Observations, Parameters, Task, inputs_of
from wmengine.parts.fields import MAX_DIMENSION, canonical_integer, canonical_shape, integer, one_of, shape
from wmengine.parts.matching import fitted, match_tensors
from wmengine.suspects.base import Suspect

MARKED = ("all", "widest")
UNIT_CARRIERS = ("unit_filters", "unit_filter_mean")
MAX_BETA = 1 << 16
_PLAIN_CARRIERS = ("flat", "filter_mean")

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Weights:
    """carrier: what is read of a weight [O, ...], as it stands after folding the normalisation behind it; projection:
    "sketch", "rademacher" or "gaussian"; marked: "all" weights, the "widest" (most values per filter, the first of
    equals), or an index in the order of execution."""

    carrier: str
    projection: str
    marked: str | int = "all"

    needs = Need.TENSORS
    fields: ClassVar[tuple[str, ...]] = ("carrier", "projection", "carriers", "carrier_indices")

    def __post_init__(self) -> None:
        one_of("carrier", self.carrier, CARRIERS)
        one_of("projection", self.projection, PROJECTIONS)
        if isinstance(self.marked, str):
            one_of("marked", self.marked, MARKED)
        else:
            integer("marked", self.marked, 0, MAX_DIMENSION)

    def describe(self, task: Task, total: int) -> Parameters:
        """carriers: the shapes of the marked weights; carrier_indices: their places among all of the task's."""
        return {"carrier": self.carrier, "projection": self.projection, **marked_carriers(task, self.marked)}

    def check(self, parameters: Parameters, total: int) -> None:
        one_of("carrier", parameters["carrier"], CARRIERS)
        one_of("projection", parameters["projection"], PROJECTIONS)
        check_carriers(parameters)

    def layout(self, parameters: Parameters, total: int) -> Layout:
        return {"carrier_keys": ("uint64", (len(parameters["carriers"]),))}

    def draw(self, subkey: Draw, parameters: Parameters, total: int) -> dict[str, NDArray[Any]]:
        """ "carrier_keys" uint64 [L]: the Philox key of each marked weight's projection."""
        keys = [philox_key(subkey("projection", str(index))) for index in parameters["carrier_indices"]]
        return {"carrier_keys": np.array(keys, dtype=np.uint64)}

    def observe(self, mark: Drawn, suspect: Suspect, total: int) -> Observations:
        """y [T] for every pairing of carriers and the suspect's tensors that keeps their order."""
        parameters = mark.parameters

        def project(carrier: int, values: Array, factors: Array | None) -> NDArray[Any]:
            return ops.carrier_projection(
                folded(values, factors, parameters["carrier"]),
                int(mark.arrays["carrier_keys"][carrier]),
                total,
                parameters["carrier"],
                parameters["projection"],
            )

        def whole(parts: Sequence[NDArray[Any] | None]) -> NDArray[np.float64]:
            """Projections are linear: what is read of all weights is the sum of what each gives."""
            y = np.zeros(total)
            for part in parts:
                if part is not None:
                    y += part
            return y

        return observed(mark, suspect, project, whole)


@dataclass(frozen=True)
class PeriodicWeights(Weights):
    """Bits in the place where y stands in its period: sin(β·y) is what is read (Li, Tondi, Barni 2021).

    "Spread-transform dither modulation watermarking of deep neural network", JISA 2021: the bit is Θ(Xw) > 1/2 with
    Θ(z) = σ(α·sin(β·z)), so the nearest half period is never far, and little has to move. α steers training only. The
    period is one of the weights' own units: whoever scales them has moved every bit, which a sign would survive.

    The null is exact: sin(β·y) is a function of the suspect, β and the geometry, and of no bit.
    """

    beta: int = 10

    fields: ClassVar[tuple[str, ...]] = (*Weights.fields, "beta")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("carrier", self.carrier, _PLAIN_CARRIERS)
        integer("beta", self.beta, 1, MAX_BETA)

    def describe(self, task: Task, total: int) -> Parameters:
        return super().describe(task, total) | {"beta": int(self.beta)}

    def check(self, parameters: Parameters, total: int) -> None:
        super().check(parameters, total)
        one_of("carrier", parameters["carrier"], _PLAIN_CARRIERS)
        canonical_integer("beta", parameters["beta"], 1, MAX_BETA)

    def observe(self, mark: Drawn, suspect: Suspect, total: int) -> Observations:
        linear = super().observe(mark, suspect, total)
        found = [Observation(np.sin(mark.parameters["beta"] * each.y), each.share) for each in linear.found]
        return Observations(found, linear.facts)


def marked_carriers(task: Task, marked: str | int) -> Parameters:
    """The shapes of the weights to be marked and their places among all of the task's; ValueError where there are none.

    marked: "all", "widest", or a place.
    """
    shapes, allowed = task.weights()
    every = [shape(f"shapes[{index}]", sizes, least=2) for index, sizes in enumerate(shapes)]
    if not allowed:
        raise ValueError(
            "it marks the weights of convolutions, linear and recurrent layers, and this network trains none"
        )
    if marked == "all":
        indices = allowed
    elif marked == "widest":
        indices = [max(allowed, key=lambda index: (math.prod(every[index][1:]), -index))]
    else:
        indices = [integer("marked", marked, 0, len(every) - 1)]
        if indices[0] not in allowed:
            raise ValueError(f"it is to mark weight {indices[0]}, which is not trained")
    return {"carriers": [every[index] for index in indices], "carrier_indices": indices}


def check_carriers(parameters: Parameters) -> None:
    """ValueError unless `carriers` and `carrier_indices` are as `marked_carriers` gives them."""
    carriers, indices = parameters["carriers"], parameters["carrier_indices"]
    if type(carriers) is not list or type(indices) is not list or not carriers or len(carriers) != len(indices):
        raise ValueError("carriers and carrier_indices must be lists of the same length, at least 1")
    for position, (sizes, index) in enumerate(zip(carriers, indices, strict=True)):
        canonical_shape(f"carriers[{position}]", sizes, least=2)
        canonical_integer(f"carrier_indices[{position}]", index, 0, MAX_DIMENSION)
    if any(second <= first for first, second in pairwise(indices)):
        raise ValueError(f"carrier_indices must increase, and they are {indices}")


def observed(
    mark: Drawn,
    suspect: Suspect,
    part: Callable[[int, Array, Array | None], NDArray[Any]],
    whole: Callable[[Sequence[NDArray[Any] | None]], NDArray[np.float64]],
) -> Observations:
    """One observation, with its share, for every pairing of the mark's carriers and the suspect's tensors.

    part(carrier, values, factors): what one tensor shows in the place of the carrier of that number. whole: y [T] of
    what all carriers of a pairing show, None where there is no tensor. Only tensors that are paired are read, one at a
    time, each once.
    """
    parameters = mark.parameters
    shapes = [tuple(sizes) for sizes in parameters["carriers"]]
    tensors = fitted(shapes, suspect.tensors(inputs_of(parameters)))
    matching = match_tensors(shapes, tensors, parameters["carrier_indices"], mark.names)
    facts = [*suspect.facts, *matching.facts]
    if matching.found == 0:
        return Observations(facts=[*facts, fact("no_carrier")])
    wanted: dict[int, set[int]] = {}
    for pairing in matching.tries:
        for carrier, number in enumerate(pairing):
            if number is not None:
                wanted.setdefault(number, set()).add(carrier)
    shown: dict[tuple[int, int | None], NDArray[Any]] = {}
    for number, carriers in wanted.items():
        values, factors = tensors[number].read()
        shown |= {(carrier, number): part(carrier, values, factors) for carrier in sorted(carriers)}
    share = 1.0 / len(matching.tries)
    found = [whole([shown.get(pair) for pair in enumerate(pairing)]) for pairing in matching.tries]
    return Observations([Observation(y, share) for y in found], facts)


def folded(values: Any, factors: Any, carrier: str) -> Any:
    """Filters [O, ...] times the factors [O] of the normalisation behind them, an array or a tensor.

    Unit filters, as arrays, lose all of a factor but its sign.
    """
    if factors is None:
        return values
    if carrier in UNIT_CARRIERS:
        factors = np.sign(factors)
    return values * factors.reshape(-1, *[1] * (values.ndim - 1))
