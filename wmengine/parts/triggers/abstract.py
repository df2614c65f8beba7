"""Abstract triggers: pictures of nothing, drawn from the key; inputs that are no pictures get keyed noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wmengine.identity.subkeys import philox_key
from wmengine.parts.base import Draw, Drawn, Layout, Need, Parameters, Task, inputs_of
from wmengine.parts.fields import canonical_float32_hex, float32_hex, shape
from wmengine.parts.triggers.pictures import abstract_images, noise_inputs
from wmengine.suspects.adapters import Adapter, to_input
from wmengine.suspects.base import Inputs, InputSpec, Signature, Suspect

# What a network can tell apart: in half precision a span of this share of the values' size is a handful of numbers, and
# below a type's least span all of them are near its smallest.
_LEAST_SHARE = 2.0**-8
_FLOAT16, _FLOAT32 = (2.0**-17, 65504.0), (2.0**-118, 2.0**128)  # the least span, the largest value


@dataclass(frozen=True)
class AbstractTriggers:
    """For one floating input; its values' range, a pair per channel (axis 1), is part of the mark."""

    needs = Need.ANSWERS
    fields: ClassVar[tuple[str, ...]] = ("value_range",)
    drawn = staticmethod(abstract_images)

    def describe(self, task: Task, total: int) -> Parameters:
        ranges = task.value_range or ()
        return {"value_range": [[float32_hex("value_range", end) for end in ends] for ends in ranges]}

    def check(self, parameters: Parameters, total: int) -> None:
        given, ranges = floating_input(inputs_of(parameters)), parameters["value_range"]
        sizes = shape("shape", given.shape, least=1)
        if type(ranges) is not list or len(ranges) != sizes[0]:
            raise ValueError(f"value_range must hold one [lo, hi] for each of the {sizes[0]} channels of an input")
        for channel, ends in enumerate(ranges):
            if type(ends) is not list or len(ends) != 2:
                raise ValueError(f"value_range[{channel}] must be [lo, hi], and it is {ends!r}")
            low, high = (canonical_float32_hex(f"value_range[{channel}]", end) for end in ends)
            if low > high:
                raise ValueError(f"value_range[{channel}] is [{low}, {high}], and lo must not exceed hi")
            if max(abs(low), abs(high)) > _limits(given.dtype)[1]:
                raise ValueError(f"value_range[{channel}] is [{low}, {high}], and {given.dtype} ends before")
        if not _wide_channels(parameters):
            raise ValueError(
                "value_range is so narrow in every channel that all triggers would be equal to a network: give the "
                "range that its inputs really have"
            )

    def layout(self, parameters: Parameters, total: int) -> Layout:
        return {"triggers": ("uint8", (total, *_shape(parameters)))}

    def draw(self, subkey: Draw, parameters: Parameters, total: int) -> dict[str, NDArray[Any]]:
        """ "triggers" uint8 [N, *shape]; 0 … 255 stand for the range of each channel. Raises ValueError where too few
        channels vary for them to be different."""
        triggers = self.drawn(philox_key(subkey("triggers")), total, _shape(parameters))
        wide = _wide_channels(parameters)
        if len({image[wide].tobytes() for image in triggers}) < total:
            raise ValueError(f"only {len(wide)} channels vary, too few for {total} triggers that a network tells apart")
        return {"triggers": triggers}

    def ways(self, mark: Drawn, suspect: Suspect, every: bool) -> list[Adapter]:
        return suspect.adapters(_shape(mark.parameters), mark.parameters["value_range"], every)

    def inputs(self, mark: Drawn, way: Adapter, start: int, stop: int) -> Inputs:
        (name,) = inputs_of(mark.parameters)
        return {name: way.inputs(mark.arrays["triggers"][start:stop], mark.parameters["value_range"])}

    def examples(self, mark: Drawn) -> dict[str, NDArray[np.float32]]:
        """All triggers as the model's own training loop feeds them."""
        (name,) = inputs_of(mark.parameters)
        return {name: to_input(mark.arrays["triggers"], mark.parameters["value_range"])}


class NoiseTriggers(AbstractTriggers):
    """The same with uniform noise over the range of each channel in place of pictures."""

    drawn = staticmethod(noise_inputs)


def floating_input(inputs: Signature) -> InputSpec:
    """The one input of a task. Raises ValueError, naming the schemes for others, where it is not one or no floats."""
    if len(inputs) != 1:
        raise ValueError(
            f"its triggers are for models of one input, and this one takes {', '.join(inputs)}: leave masks out where "
            "the model can do without them; 'adi_tokens' has some for tokens with masks, 'adi_table' for the columns "
            "of a table"
        )
    (given,) = inputs.values()
    if not given.dtype.startswith(("float", "bfloat")):
        mend = "'adi_tokens' has some for tokens, 'adi_table' for rows of a table"
        if given.dtype == "uint8":
            mend = "turn bytes into floats before mix, and mark the network that takes these"
        raise ValueError(f"its triggers are for floating inputs, and this model takes {given.dtype}: {mend}")
    return given


def _shape(parameters: Parameters) -> Sequence[int]:
    (given,) = inputs_of(parameters).values()
    return given.shape


def _wide_channels(parameters: Parameters) -> list[int]:
    """The channels in which a network of the inputs' type can tell two triggers apart."""
    (given,) = inputs_of(parameters).values()
    least, _ = _limits(given.dtype)
    wide = []
    for channel, ends in enumerate(parameters["value_range"]):
        low, high = (float.fromhex(end) for end in ends)
        if high - low >= max(least, _LEAST_SHARE * max(abs(low), abs(high))):
            wide.append(channel)
    return wide


def _limits(dtype: str) -> tuple[float, float]:
    return _FLOAT16 if dtype == "float16" else _FLOAT32
