"""A published scheme is a preset: one short entry that names its parts; symbols are derived from a key in one place.

A preset has two halves. The *parameters* (`white_box_parameters`, `black_box_parameters`) are all that scoring needs
besides the key: integers and strings only, and part of every derivation and commitment, so nobody can change one after
the fact. The rest (link, strength, margin) only steers training; it stays out of the parameters, where it would be a
nonce that a forger may turn for free.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wmengine.key import Key, check_name, keyed_bits, keyed_labels, philox_key
from wmengine.ops.reference import CARRIERS, LINKS, PROJECTIONS
from wmengine.triggers import abstract_images

MARKED = ("all", "widest")
TRIGGERS = ("abstract",)
LABELS = ("uniform",)

MAX_BITS = 1 << 16
MAX_TRIGGERS = 1 << 20
MAX_CLASSES = 1 << 31
MAX_DIMENSION = 1 << 40


def _one_of(what: str, value: object, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, and it is {value!r}")


def _integer(what: str, value: Any, least: int, most: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{what} must be an integer, and it is {value!r}") from None
    if not least <= number <= most:
        raise ValueError(f"{what} must be from {least} to {most}, and it is {number}")
    return number


def _positive(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{what} must be a positive number, and it is {value!r}")


@dataclass(frozen=True)
class WhiteBox:
    """Bits in the weights: carrier × projection × link. The statistic is the number of matching bits.

    marked: "all" weights, the "widest" (most values per filter, the first of equals), or an index in graph order.
    strength: λ, the factor on the embedding loss, a sum over the bits; margin: where `hinge` and `mse` want s·y to be.
    null: "exact", "bound" or "rank" (what a p-value of this scheme is).
    """

    name: str
    version: int
    carrier: str
    projection: str
    marked: str | int
    bits: int
    link: str
    strength: float
    margin: float
    null: str
    paper: str

    kind: ClassVar[str] = "white-box"
    scoring: ClassVar[str] = (
        "bit t reads 1 if y_t > 0 and 0 if y_t < 0, zero and non-finite y_t never match; p = P(Bin(T, 1/2) >= matches)"
    )

    def __post_init__(self) -> None:
        _one_of("carrier", self.carrier, CARRIERS)
        _one_of("projection", self.projection, PROJECTIONS)
        _one_of("link", self.link, LINKS)
        if isinstance(self.marked, str):
            _one_of("marked", self.marked, MARKED)
        else:
            _integer("marked", self.marked, 0, MAX_DIMENSION)
        _integer("bits", self.bits, 1, MAX_BITS)
        _positive("strength", self.strength)
        _positive("margin", self.margin)


@dataclass(frozen=True)
class BlackBox:
    """Keyed inputs with keyed labels, learned as a backdoor. The statistic is how many are answered with their label.

    triggers: what the inputs look like; labels: how each trigger's label is drawn; count: N, the size of the set.
    null: "exact", "bound" or "rank" (what a p-value of this scheme is).
    """

    name: str
    version: int
    triggers: str
    labels: str
    count: int
    null: str
    paper: str

    kind: ClassVar[str] = "black-box"
    scoring: ClassVar[str] = (
        "a hit is an answer equal to the label, abstentions never match; p = P(Bin(N, 1/num_classes) >= hits)"
    )

    def __post_init__(self) -> None:
        _one_of("triggers", self.triggers, TRIGGERS)
        _one_of("labels", self.labels, LABELS)
        _integer("count", self.count, 1, MAX_TRIGGERS)


Scheme = WhiteBox | BlackBox

_PRESETS: tuple[Scheme, ...] = (
    WhiteBox(
        name="sketch",
        version=1,
        carrier="unit_filters",
        projection="sketch",
        marked="all",
        bits=256,
        link="hinge",
        strength=0.001,
        margin=5.0,
        null="exact",
        paper="wmengine: one keyed sign per weight and T buckets, over the unit filters of all layers",
    ),
    WhiteBox(
        name="uchida",
        version=1,
        carrier="filter_mean",
        projection="gaussian",
        marked="widest",
        bits=256,
        link="bce",
        strength=0.01,
        margin=1.0,
        null="exact",
        paper="Uchida, Nagai, Sakazawa, Satoh: Embedding watermarks into deep neural networks, ICMR 2017",
    ),
    BlackBox(
        name="adi",
        version=1,
        triggers="abstract",
        labels="uniform",
        count=100,
        null="exact",
        paper="Adi, Baum, Cisse, Pinkas, Keshet: Turning your weakness into a strength, USENIX Security 2018",
    ),
)
SCHEMES: Mapping[str, Scheme] = {preset.name: preset for preset in _PRESETS}

_FIXED = ("name", "version", "null", "paper")
_WHITE_BOX_FIELDS = ("bits", "carrier", "projection", "carriers", "carrier_indices", "input_shape", "name")
_BLACK_BOX_FIELDS = ("count", "triggers", "labels", "num_classes", "input_shape", "value_range", "name")


def scheme(name: str, /, **overrides: Any) -> Scheme:
    """The preset of that name, with some of its options replaced: `scheme("sketch", bits=64)`.

    Raises ValueError for a name or an option that does not exist (listing those that do) and for a value out of range.
    """
    preset = SCHEMES.get(name) if isinstance(name, str) else None
    if preset is None:
        raise ValueError(f"there is no scheme {name!r}; the schemes are {', '.join(SCHEMES)}")
    options = [field.name for field in fields(preset) if field.name not in _FIXED]
    unknown = [option for option in overrides if option not in options]
    if unknown:
        raise ValueError(f"scheme {name!r} has no option {unknown[0]!r}; its options are {', '.join(options)}")
    return replace(preset, **overrides)


def white_box_parameters(
    scheme: WhiteBox,
    shapes: Sequence[Sequence[int]],
    input_shape: Sequence[int],
    name: str,
    *,
    trainable: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The canonical parameters of a white-box mark in a network whose weights have these shapes.

    shapes: every carrier's shape [O, ...] with filters on axis 0, in graph order; input_shape: one input's, without
    the batch axis; name: the model's; trainable: the places in `shapes` that may be marked, rising (None: all). In
    the result `carriers` holds the shapes of the marked weights, and `carrier_indices` their places among all of
    `shapes`. Raises ValueError when there is nothing to mark.
    """
    every = [_shape(f"shapes[{index}]", shape, least=2) for index, shape in enumerate(shapes)]
    allowed = list(range(len(every)) if trainable is None else trainable)
    if not allowed:
        raise ValueError(f"scheme {scheme.name!r} needs at least one weight to mark, and this network has none")
    if scheme.marked == "all":
        indices = allowed
    elif scheme.marked == "widest":
        indices = [max(allowed, key=lambda index: (math.prod(every[index][1:]), -index))]
    else:
        indices = [_integer("marked", scheme.marked, 0, len(every) - 1)]
        if indices[0] not in allowed:
            raise ValueError(f"scheme {scheme.name!r} is to mark weight {indices[0]}, which is not trained")
    return {
        "bits": scheme.bits,
        "carrier": scheme.carrier,
        "projection": scheme.projection,
        "carriers": [every[index] for index in indices],
        "carrier_indices": indices,
        "input_shape": _shape("input_shape", input_shape, least=0),
        "name": check_name("name", name),
    }


def black_box_parameters(
    scheme: BlackBox,
    input_shape: Sequence[int],
    num_classes: int,
    value_range: Sequence[Sequence[float]],
    name: str,
) -> dict[str, Any]:
    """The canonical parameters of a black-box mark.

    input_shape: one input's, without the batch axis; value_range: [lo, hi] for each index of its first axis (the
    channels of an image), rounded to float32 and written with float.hex, so as to be strings; name: the model's.
    """
    parameters = {
        "count": scheme.count,
        "triggers": scheme.triggers,
        "labels": scheme.labels,
        "num_classes": _integer("num_classes", num_classes, 2, MAX_CLASSES),
        "input_shape": _shape("input_shape", input_shape, least=1),
        "value_range": [[_float32_hex(end) for end in ends] for ends in value_range],
        "name": check_name("name", name),
    }
    check_parameters(scheme.name, parameters)
    return parameters


def check_parameters(scheme_name: str, parameters: Mapping[str, Any]) -> None:
    """Raises ValueError unless `parameters` are complete, in range and in canonical form for this scheme."""
    preset = scheme(scheme_name)
    expected = _WHITE_BOX_FIELDS if isinstance(preset, WhiteBox) else _BLACK_BOX_FIELDS
    for field in expected:
        if field not in parameters:
            raise ValueError(f"the parameters of {scheme_name!r} lack {field!r}")
    for field in parameters:
        if field not in expected:
            raise ValueError(f"the parameters of {scheme_name!r} hold an unknown field {field!r}")
    check_name("name", parameters["name"])
    if isinstance(preset, WhiteBox):
        _check_white_box(parameters)
    else:
        _check_black_box(parameters)


def _check_white_box(parameters: Mapping[str, Any]) -> None:
    _canonical_integer("bits", parameters["bits"], 1, MAX_BITS)
    _one_of("carrier", parameters["carrier"], CARRIERS)
    _one_of("projection", parameters["projection"], PROJECTIONS)
    _canonical_shape("input_shape", parameters["input_shape"], least=0)
    carriers, indices = parameters["carriers"], parameters["carrier_indices"]
    if type(carriers) is not list or type(indices) is not list or not carriers or len(carriers) != len(indices):
        raise ValueError("carriers and carrier_indices must be lists of the same length, at least 1")
    for position, (shape, index) in enumerate(zip(carriers, indices, strict=True)):
        _canonical_shape(f"carriers[{position}]", shape, least=2)
        _canonical_integer(f"carrier_indices[{position}]", index, 0, MAX_DIMENSION)
    if any(second <= first for first, second in pairwise(indices)):
        raise ValueError(f"carrier_indices must increase, and they are {indices}")


def _check_black_box(parameters: Mapping[str, Any]) -> None:
    _canonical_integer("count", parameters["count"], 1, MAX_TRIGGERS)
    _one_of("triggers", parameters["triggers"], TRIGGERS)
    _one_of("labels", parameters["labels"], LABELS)
    _canonical_integer("num_classes", parameters["num_classes"], 2, MAX_CLASSES)
    _canonical_shape("input_shape", parameters["input_shape"], least=1)
    ranges, channels = parameters["value_range"], parameters["input_shape"][0]
    if type(ranges) is not list or len(ranges) != channels:
        raise ValueError(f"value_range must hold one [lo, hi] for each of the {channels} channels of an input")
    widest = 0.0
    for channel, ends in enumerate(ranges):
        if type(ends) is not list or len(ends) != 2 or not all(map(_is_float32_hex, ends)):
            raise ValueError(f"value_range[{channel}] must be [lo, hi], finite float32 numbers written with float.hex")
        low, high = (float.fromhex(end) for end in ends)
        if low > high:
            raise ValueError(f"value_range[{channel}] is [{low}, {high}], and lo must not exceed hi")
        widest = max(widest, high - low)
    if widest == 0.0:
        raise ValueError("value_range is a single point in every channel, so all triggers would be equal")


def derive(key: Key, scheme_name: str, parameters: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Everything that scoring needs, from the key and the parameters alone: both embedding and its check call this.

    White-box: "bits" uint8[T] in {0, 1}, and "carrier_keys" uint64[L], the Philox key of each marked weight.
    Black-box: "triggers" uint8[N, *input_shape], and "labels" int64[N], iid uniform over the classes.
    """
    check_parameters(scheme_name, parameters)
    if isinstance(SCHEMES[scheme_name], WhiteBox):
        carrier_keys = [
            philox_key(subkey(key, "projection", scheme_name, parameters, str(index)))
            for index in parameters["carrier_indices"]
        ]
        return {
            "bits": keyed_bits(subkey(key, "bits", scheme_name, parameters), parameters["bits"]),
            "carrier_keys": np.array(carrier_keys, dtype=np.uint64),
        }
    trigger_key = philox_key(subkey(key, "triggers", scheme_name, parameters))
    label_key = subkey(key, "labels", scheme_name, parameters)
    return {
        "triggers": abstract_images(trigger_key, parameters["count"], parameters["input_shape"]),
        "labels": keyed_labels(label_key, parameters["count"], parameters["num_classes"]),
    }


def subkey(key: Key, purpose: str, scheme_name: str, parameters: Mapping[str, Any], carrier: str = "") -> bytes:
    """The key's subkey for one purpose of a mark; the scheme enters with its version."""
    return key.subkey(purpose, f"{scheme_name}/{SCHEMES[scheme_name].version}", parameters, carrier)


def array_layout(scheme_name: str, parameters: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype, shape) of the arrays that `derive` gives for these (checked) parameters, without deriving them."""
    if isinstance(SCHEMES[scheme_name], WhiteBox):
        return {"bits": ("uint8", (parameters["bits"],)), "carrier_keys": ("uint64", (len(parameters["carriers"]),))}
    count = parameters["count"]
    return {"triggers": ("uint8", (count, *parameters["input_shape"])), "labels": ("int64", (count,))}


def symbol_count(scheme_name: str, parameters: Mapping[str, Any]) -> int:
    """The number of symbols that a mark can test: T bits or N labels."""
    return int(parameters["bits" if isinstance(SCHEMES[scheme_name], WhiteBox) else "count"])


def symbol_chance(scheme_name: str, parameters: Mapping[str, Any]) -> float:
    """p0, the chance that a stranger matches one symbol: it comes from the key's alphabet, not from the suspect's."""
    return 0.5 if isinstance(SCHEMES[scheme_name], WhiteBox) else 1.0 / int(parameters["num_classes"])


def _canonical_integer(what: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int:
        raise ValueError(f"{what} must be an integer, and it is {value!r}")
    return _integer(what, value, least, most)


def _shape(what: str, shape: Sequence[int], least: int) -> list[int]:
    dimensions = [_integer(f"{what}[{axis}]", size, 1, MAX_DIMENSION) for axis, size in enumerate(shape)]
    if len(dimensions) < least:
        raise ValueError(f"{what} must have at least {least} axes, and it is {dimensions}")
    return dimensions


def _canonical_shape(what: str, shape: Any, least: int) -> None:
    if type(shape) is not list or any(type(size) is not int for size in shape):
        raise ValueError(f"{what} must be a list of integers, and it is {shape!r}")
    _shape(what, shape, least)


def _float32_hex(value: Any) -> str:
    """A number as the float.hex of its float32; zero has no sign."""
    try:
        if isinstance(value, str):
            raise TypeError
        with np.errstate(over="ignore"):
            number = float(np.float32(float(value)))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"value_range must hold numbers, and {value!r} is not one") from None
    if not math.isfinite(number):
        raise ValueError(f"value_range must be finite in float32, and it holds {value!r}")
    return (number + 0.0).hex()


def _is_float32_hex(text: object) -> bool:
    try:
        return isinstance(text, str) and _float32_hex(float.fromhex(text)) == text
    except (ValueError, OverflowError):
        return False
