"""Abstract triggers: pictures of nothing, drawn from the key; inputs that are no pictures get keyed noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.identity.subkeys import philox_key
from wmengine.parts.base import Draw, Drawn, Layout, Need, Parameters, Task
from wmengine.parts.fields import canonical_float32_hex, canonical_inputs, canonical_shape, float32_hex, signature_of
from wmengine.parts.triggers.pictures import abstract_images
from wmengine.suspects.adapters import Adapter, to_input
from wmengine.suspects.base import Inputs, Suspect

# A channel whose values span less than this much of their size is one value to a network in float16.
_NARROWEST = 2.0**-8


@dataclass(frozen=True)
class AbstractTriggers:
    """For one floating input; its values' range, a pair per channel (axis 1), is part of the mark."""

    needs = Need.ANSWERS
    fields = ("value_range",)

    def describe(self, task: Task, total: int) -> Parameters:
        ranges = task.value_range or ()
        parameters = {
            "value_range": [[float32_hex("value_range", end) for end in ends] for ends in ranges],
            "inputs": canonical_inputs(task.inputs),
        }
        self.check(parameters)
        return {"value_range": parameters["value_range"]}

    def check(self, parameters: Parameters) -> None:
        inputs, ranges = signature_of(parameters), parameters["value_range"]
        if len(inputs) != 1:
            raise ValueError(f"abstract triggers are for models of one input, and this one takes {', '.join(inputs)}")
        (given,) = inputs.values()
        if not given.dtype.startswith(("float", "bfloat")):
            raise ValueError(f"abstract triggers are for floating inputs, and this model takes {given.dtype}")
        sizes = canonical_shape("shape", list(given.shape), least=1)
        if type(ranges) is not list or len(ranges) != sizes[0]:
            raise ValueError(f"value_range must hold one [lo, hi] for each of the {sizes[0]} channels of an input")
        widest = 0.0
        for channel, ends in enumerate(ranges):
            if type(ends) is not list or len(ends) != 2:
                raise ValueError(f"value_range[{channel}] must be [lo, hi], and it is {ends!r}")
            low, high = (canonical_float32_hex(f"value_range[{channel}]", end) for end in ends)
            if low > high:
                raise ValueError(f"value_range[{channel}] is [{low}, {high}], and lo must not exceed hi")
            span = (high - low) / max(abs(low), abs(high), 1e-300)
            widest = max(widest, span if high - low > 0.0 else 0.0)
        if widest < _NARROWEST:
            raise ValueError(
                "value_range is so narrow in every channel that all triggers would be equal to a network: give the "
                "range that its inputs really have"
            )

    def layout(self, parameters: Parameters, total: int) -> Layout:
        return {"triggers": ("uint8", (total, *_shape(parameters)))}

    def draw(self, subkey: Draw, parameters: Parameters, total: int) -> dict[str, NDArray[Any]]:
        """ "triggers" uint8 [N, *shape]; 0 … 255 stand for the range of each channel."""
        return {"triggers": abstract_images(philox_key(subkey("triggers")), total, _shape(parameters))}

    def ways(self, mark: Drawn, suspect: Suspect, every: bool) -> list[Adapter]:
        return suspect.adapters(_shape(mark.parameters), mark.parameters["value_range"], every)

    def inputs(self, mark: Drawn, way: Adapter) -> Inputs:
        (name,) = signature_of(mark.parameters)
        return {name: way.inputs(mark.arrays["triggers"], mark.parameters["value_range"])}

    def examples(self, mark: Drawn) -> dict[str, NDArray[np.float32]]:
        """All triggers as the model's own training loop feeds them."""
        (name,) = signature_of(mark.parameters)
        return {name: to_input(mark.arrays["triggers"], mark.parameters["value_range"])}


def _shape(parameters: Parameters) -> Sequence[int]:
    (given,) = signature_of(parameters).values()
    return given.shape
