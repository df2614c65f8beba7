"""How triggers are put to a suspect that came from strangers: layout, scaling and type of its input.

A mark's triggers are images of bytes [N, C, ...] and a range of values for each channel. The model's own copy takes
them as its owner's training loop did. A copy exported elsewhere may want channels last, a flat vector, bytes with the
scaling inside the graph, or numbers on another scale. What a declared shape and type decide costs nothing. What they
leave open is tried, and every try has its share of the evidence, fixed before the first answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wmengine.errors import OtherTask

Range = Sequence[Sequence[str | float]]
Images = NDArray[np.uint8]

FLOATS = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}
FLOATS["tensor(bfloat16)"] = "float32"  # as NumPy has none; the engine rounds it
BYTES = {"tensor(uint8)": "uint8", "tensor(int8)": "int8", "tensor(int32)": "int32", "tensor(int64)": "int64"}
# Means and deviations of ImageNet's channels, in [0, 1], as its classifiers are fed since AlexNet's descendants.
_IMAGENET = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))


class Adapter(NamedTuple):
    """One way to put triggers to a suspect; `share` of the evidence is staked on it, and all shares sum to 1.

    layout: "as recorded", "channels last", "flat" or "flat, channels last". scaling: "as recorded", "bytes", "0 to 1",
    "0 to 255", "-1 to 1" or "ImageNet". dtype: what the input takes.
    """

    layout: str = "as recorded"
    scaling: str = "as recorded"
    dtype: str = "float32"
    share: float = 1.0

    def __str__(self) -> str:
        parts = [] if self.layout == "as recorded" else [self.layout]
        if self.scaling == "bytes":
            parts.append("as bytes")
        elif self.scaling != "as recorded":
            parts.append(f"scaled {self.scaling}" if self.scaling[0] in "-0" else f"scaled as {self.scaling}'s")
        if self.dtype not in ("float32", "uint8"):
            parts.append(f"cast to {self.dtype}")
        return ", ".join(parts) or "as recorded"

    def inputs(self, triggers: Images, value_range: Range) -> NDArray[np.generic]:
        """Triggers uint8 [N, C, ...] as this suspect takes them."""
        values = triggers if self.scaling == "bytes" else to_input(triggers, _SCALINGS[self.scaling](value_range))
        return self._laid_out(values)

    def recorded_inputs(self, values: NDArray[np.float32], value_range: Range) -> NDArray[np.generic]:
        """Values [N, C, ...] on the mark's own scale, such as task data, as this suspect takes them."""
        if self.scaling == "as recorded":
            return self._laid_out(values)
        one = [1] * (values.ndim - 2)
        low, high = (ends.reshape(1, -1, *one) for ends in ends_of(value_range))
        fraction = (values.astype(np.float64) - low) / np.where(high == low, 1.0, high - low)
        if self.scaling == "bytes":
            return self._laid_out(np.rint(fraction * 255.0).clip(0.0, 255.0))
        low, high = (ends.reshape(1, -1, *one) for ends in ends_of(_SCALINGS[self.scaling](value_range)))
        return self._laid_out((low + fraction * (high - low)).astype(np.float32))

    def _laid_out(self, values: NDArray[Any]) -> NDArray[np.generic]:
        if self.dtype == "int8":  # as TensorFlow Lite quantises an input: -128 is the lowest value
            values = values.astype(np.int16) - 128
        return np.ascontiguousarray(_LAYOUTS[self.layout](values).astype(self.dtype, copy=False))


AS_RECORDED = Adapter()

_SCALINGS: dict[str, Callable[[Range], Range]] = {
    "as recorded": lambda recorded: recorded,
    "0 to 1": lambda recorded: [(0.0, 1.0)] * len(recorded),
    "0 to 255": lambda recorded: [(0.0, 255.0)] * len(recorded),
    "-1 to 1": lambda recorded: [(-1.0, 1.0)] * len(recorded),
    "ImageNet": lambda recorded: [(-mean / deviation, (1.0 - mean) / deviation) for mean, deviation in _IMAGENET],
}
_LAYOUTS: dict[str, Callable[[NDArray[np.generic]], NDArray[np.generic]]] = {
    "as recorded": lambda values: values,
    "channels last": lambda values: np.moveaxis(values, 1, -1),
    "flat": lambda values: values.reshape(len(values), -1),
    "flat, channels last": lambda values: np.moveaxis(values, 1, -1).reshape(len(values), -1),
}
SCALING_NAMES, LAYOUT_NAMES = tuple(_SCALINGS), tuple(_LAYOUTS)


def to_input(triggers: NDArray[np.uint8], value_range: Sequence[Sequence[str | float]]) -> NDArray[np.float32]:
    """Triggers as a network reads them: 0 … 255 becomes lo … hi of its channel, float32, same shape.

    triggers: uint8[N, C, ...]; value_range: [lo, hi] per channel, numbers or float.hex strings as a mark's parameters
    hold them. lo + (hi − lo)·q/255 is computed as (lo·(255−q) + hi·q)/255 in float64, which gives both ends exactly.
    """
    if triggers.dtype != np.uint8 or triggers.ndim < 2 or triggers.shape[1] != len(value_range):
        raise ValueError(
            f"triggers must be uint8[N, {len(value_range)}, ...] for a value_range of {len(value_range)} channels, "
            f"not {triggers.dtype}{list(triggers.shape)}"
        )
    ends = [[float.fromhex(end) if isinstance(end, str) else float(end) for end in pair] for pair in value_range]
    levels = np.arange(256, dtype=np.float64)
    table = np.array([(low * (255.0 - levels) + high * levels) / 255.0 for low, high in ends]).astype(np.float32)
    channel = np.arange(len(ends)).reshape(1, -1, *[1] * (triggers.ndim - 2))
    return np.asarray(table[channel, triggers], dtype=np.float32)


def to_levels(values: NDArray[Any], value_range: Range) -> NDArray[np.uint8]:
    """What :func:`to_input` undoes: values [N, C, ...] as 0 … 255 between lo and hi of their channel, the nearest."""
    low, high = (ends.reshape(1, -1, *[1] * (values.ndim - 2)) for ends in ends_of(value_range))
    fraction = (values.astype(np.float64) - low) / np.where(high == low, 1.0, high - low)
    return np.asarray(np.rint(255.0 * fraction).clip(0.0, 255.0), dtype=np.uint8)


def adapters(
    name: str,
    input_type: str,
    input_shape: Sequence[int | None],
    trigger_shape: Sequence[int],
    value_range: Range,
    scalings: bool = True,
) -> list[Adapter]:
    """Every way that the declared input leaves open, the likeliest first, with its share of the evidence.

    input_shape: of the whole batch, None where a size is free; empty where no shape is declared. trigger_shape: of one
    trigger, channels first. scalings: whether to try others than the recorded one. The recorded way has half of the
    evidence, the others share the rest. Raises OtherTask where no way fits.
    """
    layouts = layouts_of(input_shape, trigger_shape)
    if not layouts:
        raise other_shape(name, input_shape, trigger_shape)
    ranges: tuple[str, ...]
    if input_type in BYTES:
        ranges, dtype = ("bytes",), BYTES[input_type]
    elif input_type in FLOATS:
        recorded = tuple((low, high) for low, high in value_range)
        ranges, dtype = _distinct_scalings(recorded) if scalings else ("as recorded",), FLOATS[input_type]
    else:
        known = ", ".join([*FLOATS, *BYTES])
        raise OtherTask(f"{name} takes {input_type}, and triggers can be {known}")
    ways = [(layout, scaling) for scaling in ranges for layout in layouts]
    shares = [1.0] if len(ways) == 1 else [0.5, *[0.5 / (len(ways) - 1)] * (len(ways) - 1)]
    return [Adapter(layout, scaling, dtype, share) for (layout, scaling), share in zip(ways, shares, strict=True)]


def ends_of(value_range: Range) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The low and the high end of each channel; a mark's parameters write them with float.hex."""
    ends = [[float.fromhex(end) if isinstance(end, str) else float(end) for end in pair] for pair in value_range]
    return np.array([low for low, _ in ends]), np.array([high for _, high in ends])


@lru_cache(maxsize=256)  # in a scan most suspects declare the same
def rows_as(declared: tuple[int | None, ...], sizes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of a row of these sizes as an input takes it that is declared so, batch axis first; None if it cannot.

    Axes of length 1 come and go: [1, 16, 16] fits [N, 16, 16], [T] fits [N, 1, T]. An input of fixed sizes without a
    batch axis takes a single row; nothing declared takes everything.
    """
    if not declared:
        return sizes
    core = [size for size in sizes if size != 1]
    for axes in (declared[1:], declared) if declared[0] is not None else (declared[1:],):
        for have in (list(sizes), core):
            for places in ([*range(len(axes))], [place for place, size in enumerate(axes) if size != 1]):
                if len(places) == len(have) and all(
                    axes[place] in (None, size) for place, size in zip(places, have, strict=True)
                ):
                    found = [1] * len(axes)
                    for place, size in zip(places, have, strict=True):
                        found[place] = size
                    return tuple(found)
    return None


def without_batch(declared: Sequence[int | None], row: Sequence[int]) -> bool:
    """Whether an input that takes rows of this shape, as `rows_as` gave it, has no batch axis."""
    return bool(declared) and len(declared) == len(row)


def layouts_of(declared: Sequence[int | None], shape: Sequence[int]) -> list[str]:
    """The layouts of rows of this shape that an input takes, without those that put the same numbers at the same places
    as one before."""
    kept: dict[tuple[tuple[int, ...], bytes], str] = {}
    for layout, laid_out, places in _layouts(tuple(shape)):
        row = rows_as(tuple(declared), laid_out)
        if row is not None:
            kept.setdefault((row, places), layout)
    return [*kept.values()]


def other_shape(name: str, declared: Sequence[int | None], shape: Sequence[int]) -> OtherTask:
    takes = ["N", *("any" if size is None else str(size) for size in declared[1:])]
    return OtherTask(
        f"{name} takes inputs [{', '.join(takes)}] and the watermark's triggers are "
        f"[{', '.join(['N', *map(str, shape)])}]; verify a suspect of the same input shape"
    )


@lru_cache(maxsize=64)
def _layouts(shape: tuple[int, ...]) -> tuple[tuple[str, tuple[int, ...], bytes], ...]:
    """Every layout, the shape that it gives a row of this one, and where each number goes."""
    places = np.arange(int(np.prod(shape))).reshape(1, *shape)
    moved = [(layout, lay_out(places)) for layout, lay_out in _LAYOUTS.items()]
    return tuple((layout, each.shape[1:], each.tobytes()) for layout, each in moved)


@lru_cache(maxsize=64)
def _distinct_scalings(recorded: tuple[tuple[str | float, str | float], ...]) -> tuple[str, ...]:
    """Without those that are the recorded one within a hundredth of its span."""
    levels = np.zeros((1, len(recorded), 2), np.uint8)
    levels[..., 1] = 255
    own = to_input(levels, recorded)
    kept = ["as recorded"]
    for scaling, ends in _SCALINGS.items():
        if scaling == "as recorded" or (scaling == "ImageNet" and len(recorded) != len(_IMAGENET)):
            continue
        if np.abs(to_input(levels, ends(recorded)) - own).max() > 0.01 * np.abs(own[..., 1] - own[..., 0]).max():
            kept.append(scaling)
    return tuple(kept)
