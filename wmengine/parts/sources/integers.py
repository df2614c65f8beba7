"""Bits in quantised weights: one step up or down at keyed places, read as the change against the owner's own integers.

Zhang, Koushanfar: "EmMark: robust watermarks for IP protection of embedded quantized large language models", DAC 2024:
candidates are the weights of the best score α·S_q + β·S_a that are not at an end of the range, S_q = 1/|W| (a step
changes a large integer least) and S_a small for input channels of large activations; of these a seed chooses the
places, and W + b with b = ±1 is written there. Reading takes the original away again: it is not blind. Here β is 0:
activations need the owner's data, which would be one more material. Layers share the candidates by their size.

The reference is material, so it comes before the symbols: the candidates' places, values and steps are parameters in
full, chosen from the reference alone; the key draws places among them and the bits after. What is read is a function of
the suspect, the parameters and the keyed places, never of the bits, and so the null is exact. Another reference is
another identity with other bits. Values are compared in units of the step, so a file that was dequantised, or is stored
in another way, is read as well; the owner's own unmarked file shows no bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from wmengine.parts.base import (
    Draw,
    Drawn,
    Integers,
    Layout,
    Need,
    Observations,
    Parameters,
    Setting,
    Task,
)
from wmengine.parts.fields import MAX_DIMENSION, canonical_integer, canonical_shape, integer
from wmengine.parts.sources.weights import Array, observed
from wmengine.suspects.base import Suspect

_MOST_SPARE = 64
_TYPES = {"places": "<u4", "values": "<f4", "steps": "<f4"}


@dataclass(frozen=True)
class IntegerWeights:
    """spare: how many candidates there are for each bit."""

    spare: int = 8

    needs = Need.TENSORS
    fields = ("carriers", "carrier_indices", "places", "values", "steps")

    def __post_init__(self) -> None:
        integer("spare", self.spare, 1, _MOST_SPARE)

    def describe(self, task: Task, total: int) -> Parameters:
        """carriers, carrier_indices: shapes and places of the quantised weights; of each candidate places (all carriers
        one after the other, filters first), values and steps, little-endian bytes in hex digits."""
        if not task.integers:
            raise ValueError("it marks a finished file whose weights are integers: use wmengine.emmark")
        sizes = [each.values.size for each in task.integers]
        if sum(sizes) > 1 << 32:
            raise ValueError(f"it counts places in 32 bits, and there are {sum(sizes)} weights")
        shares = [math.ceil(self.spare * total * size / sum(sizes)) for size in sizes]
        places, start = [], 0
        for each, share in zip(task.integers, shares, strict=True):
            places.append(start + _salient(each, share))
            start += each.values.size
        found = np.concatenate(places)
        if len(found) < total:
            raise ValueError(f"{len(found)} weights can be moved a step, too few for {total} bits")
        values = np.concatenate([each.values.reshape(-1) for each in task.integers])[found]
        steps = np.concatenate([each.steps.reshape(-1) for each in task.integers])[found]
        return {
            "carriers": [list(each.values.shape) for each in task.integers],
            "carrier_indices": [each.place for each in task.integers],
            "places": found.astype("<u4").tobytes().hex(),
            "values": values.astype("<f4").tobytes().hex(),
            "steps": steps.astype("<f4").tobytes().hex(),
        }

    def check(self, parameters: Parameters, total: int) -> None:
        carriers, indices = parameters["carriers"], parameters["carrier_indices"]
        if type(carriers) is not list or type(indices) is not list or not carriers or len(carriers) != len(indices):
            raise ValueError("carriers and carrier_indices must be lists of the same length, at least 1")
        size = 0
        for position, (sizes, index) in enumerate(zip(carriers, indices, strict=True)):
            size += math.prod(canonical_shape(f"carriers[{position}]", sizes, least=2))
            canonical_integer(f"carrier_indices[{position}]", index, 0, MAX_DIMENSION)
        if any(second <= first for first, second in pairwise(indices)):
            raise ValueError(f"carrier_indices must increase, and they are {indices}")
        places, values, steps = (_numbers(name, parameters[name]) for name in _TYPES)
        if not total <= len(places) == len(values) == len(steps):
            raise ValueError(f"places, values and steps must be as many, and at least {total}")
        if (np.diff(places.astype(np.int64)) <= 0).any() or places[-1] >= size:
            raise ValueError(f"places must increase and be below {size}")
        if not (np.isfinite(values).all() and np.isfinite(steps).all() and (steps > 0).all()):
            raise ValueError("values must be finite and steps positive")

    def layout(self, parameters: Parameters, total: int) -> Layout:
        return {"chosen": ("int64", (total,))}

    def draw(self, subkey: Draw, parameters: Parameters, total: int) -> dict[str, NDArray[Any]]:
        """ "chosen" int64 [T]: which of the candidates hold the bits, all different."""
        count = len(parameters["places"]) // 8
        stream = hashlib.shake_256(subkey("places")).digest(8 * count)
        order = np.argsort(np.frombuffer(stream, "<u8"), kind="stable")
        return {"chosen": order[:total].astype(np.int64)}

    def observe(self, mark: Drawn, suspect: Suspect, total: int) -> Observations:
        """y [T], how many steps each chosen weight lies above the reference; 0 where there is no such weight."""
        parameters = mark.parameters
        carrier, inside = places_of(mark)
        chosen = mark.arrays["chosen"]
        values, steps = (_numbers(name, parameters[name])[chosen].astype(np.float64) for name in ("values", "steps"))

        def part(number: int, found: Array, _: Array | None) -> NDArray[Any]:
            here = carrier == number
            return np.asarray((found.reshape(-1)[inside[here]] - values[here]) / steps[here])

        def whole(parts: Sequence[NDArray[Any] | None]) -> NDArray[np.float64]:
            y = np.zeros(total)
            for number, shown in enumerate(parts):
                if shown is not None:
                    y[carrier == number] = shown
            return y

        return observed(mark, suspect, part, whole)


def places_of(mark: Drawn) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each bit the number of its carrier, and its place in that carrier's flat values, both [T]."""
    ends = np.cumsum([math.prod(sizes) for sizes in mark.parameters["carriers"]])
    places = _numbers("places", mark.parameters["places"])[mark.arrays["chosen"]].astype(np.int64)
    carrier = np.searchsorted(ends, places, side="right")
    return carrier, places - np.concatenate([[0], ends])[carrier]


def _salient(weight: Integers, count: int) -> NDArray[np.int64]:
    """The places of the largest values, in steps, of those that can be moved either way, in order."""
    score = np.where(weight.free, np.abs(weight.values / weight.steps), -1.0).reshape(-1)
    best = np.argsort(-score, kind="stable")[: min(count, int(weight.free.sum()))]
    return np.sort(best)


def _numbers(name: str, text: Any) -> NDArray[Any]:
    try:
        data = bytes.fromhex(text)
        if data.hex() == text and data:
            return np.frombuffer(data, _TYPES[name])
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{name} must hold numbers of 4 bytes in hex digits")


@dataclass(frozen=True)
class Elsewhere:
    """A mark that `wmengine.emmark` puts into a finished file."""

    takes = ("file",)

    def begin(self, setting: Setting) -> NoReturn:
        raise ValueError(f"the mark {setting.preset_name!r} is not trained: wmengine.emmark marks a finished file")
