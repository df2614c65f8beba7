"""The channels of an ONNX graph: which slices of which initializers belong to one, so that it can be moved or scaled.

Every value with a channel axis carries a lane: a run of the graph in which a channel is only copied, added to its like
or put through functions of one number, so that a factor on it reaches the lane's end. A lane begins at a weight (its
output axis) or behind a normalisation, and ends at weights and normalisations that can undo the factor. Lanes that a
residual sum joins are scaled together; those on both sides of a normalisation or of a depthwise convolution are
permuted together. What is not understood fixes the lanes that it touches: they are left as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DOMAINS = ("", "ai.onnx")
WEIGHTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
NORMALISATIONS = ("BatchNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization")
# f(s·x) = s·f(x) for every s; for positive s only; for s = −1 only; and for s = 1 only.
LINEAR = ("Identity", "Dropout", "Cast", "CastLike", "Neg", "AveragePool", "GlobalAveragePool")
POSITIVE = ("Relu", "LeakyRelu", "PRelu", "Abs", "MaxPool", "GlobalMaxPool")
ODD = ("Tanh", "Softsign", "Erf", "Sin", "Atan", "Asinh")
OTHER = ("Sigmoid", "Gelu", "Elu", "Selu", "Swish", "Softplus", "HardSigmoid", "HardSwish", "Clip", "Exp", "Pow")
CAST = ("CastLike", 1)  # asked for its type only
POOLS = ("AveragePool", "GlobalAveragePool", "MaxPool", "GlobalMaxPool")
RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")
# What a constant may pass through and stay the same number everywhere.
SPREADS = ("Expand", "CastLike", "Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")


class Use(NamedTuple):
    """An axis of an initializer along which the channels lie, each taking a block of it, and what a factor s on them
    does to it: multiply, divide, sign (as that of s), variance (of s·x, with `epsilon` added to it), nothing."""

    tensor: str
    axis: int
    effect: str
    epsilon: float = 0.0


@dataclass(frozen=True)
class Group:
    """Channels that are handled together."""

    channels: int
    uses: tuple[Use, ...]


@dataclass
class _Lane:
    channels: int
    uses: list[Use] = field(default_factory=list)
    permuted: bool = True
    rescaled: bool = True
    flipped: bool = True

    def fix(self) -> None:
        self.permuted = self.rescaled = self.flipped = False

    def keep_scale(self) -> None:
        self.rescaled = self.flipped = False


class _Place(NamedTuple):
    """The lane of a value and its channel axis, counted from the end, so that broadcasting leaves it."""

    lane: _Lane
    axis: int


class _Stored(NamedTuple):
    """An initializer, its shape as its user sees it, and for each axis of that the axis of the initializer."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]


class _Fixed(Exception):
    """An operator is not understood: what goes into it is left as it is."""


def channel_groups(model: Any, change: str) -> list[Group]:
    """The groups of channels of an onnx.ModelProto that can be "permuted", "rescaled" (by factors above 0) or "flipped"
    (by −1) without changing what the model answers. Raises ValueError where there are none."""
    import onnx_ir
    from onnx_ir.passes.common import ShapeInferencePass

    ir = onnx_ir.from_proto(model)
    ShapeInferencePass(check_type=False, strict_mode=False)(ir)
    ir.graph.sort()
    walk = _Walk(ir.graph)
    joined = walk.summed if change != "permuted" else [*walk.summed, *walk.aligned]
    groups = []
    for lanes in _connected(walk.lanes, joined):
        uses = tuple(dict.fromkeys(use for lane in lanes for use in lane.uses))
        if all(getattr(lane, change) for lane in lanes) and uses and lanes[0].channels > 1:
            groups.append(Group(lanes[0].channels, uses))
    if not groups:
        raise ValueError(f"the model has no channels that can be {change} without changing what it answers")
    return groups


def indices(channels: NDArray[np.int64], block: int) -> NDArray[np.int64]:
    """Where these channels lie on an axis on which each takes a block."""
    return (channels[:, None] * block + np.arange(block)).ravel()


def _connected(lanes: list[_Lane], pairs: Iterable[tuple[_Lane, _Lane]]) -> list[list[_Lane]]:
    groups = {id(lane): [lane] for lane in lanes}
    for one, other in pairs:
        if (into := groups[id(one)]) is not (whole := groups[id(other)]):
            into.extend(whole)
            groups.update((id(lane), into) for lane in whole)
    return list({id(group): group for group in groups.values()}.values())


class _Walk:
    """Once through a graph: its lanes, those that sums join, and those that have the same channels."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.lanes: list[_Lane] = []
        self.summed: list[tuple[_Lane, _Lane]] = []
        self.aligned: list[tuple[_Lane, _Lane]] = []
        self.places: dict[Any, _Place] = {}
        for node in graph:
            if node.op_type in ("Shape", "Size"):  # sizes stay
                continue
            begun = len(self.lanes)
            try:
                place = self._place(node)
            except _Fixed:
                place = None
                for value in node.inputs:
                    self._fix(value)
                for lane in self.lanes[begun:]:
                    lane.fix()
            if place is not None:
                self.places[node.outputs[0]] = place
        for value in self.places:
            if value.is_graph_output() or any(node.graph is not graph for node, _ in value.uses()):
                self._fix(value)

    def _fix(self, value: Any) -> None:
        if value in self.places:
            self.places[value].lane.fix()

    def _place(self, node: Any) -> _Place | None:
        given = [value for value in node.inputs[: 1 if node.op_type == "CastLike" else None] if value in self.places]
        inner = any(attribute.type.name in ("GRAPH", "GRAPHS") for attribute in node.attributes.values())
        more = any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
        if node.domain not in DOMAINS or inner or more:
            raise _Fixed
        if node.op_type in WEIGHTS:
            return self._weight(node)
        if node.op_type in NORMALISATIONS:
            return self._normalised(node)
        if node.op_type == "Gather":
            return self._embedding(node)
        if not given:
            return None
        if node.op_type in ("Add", "Sub", "Mul", "Div"):
            return self._binary(node)
        if node.inputs[0] not in self.places or len(given) > 1:
            raise _Fixed
        place = self.places[node.inputs[0]]
        if node.op_type in (*RESHAPES, *REDUCTIONS, "Transpose"):
            return _Place(place.lane, self._moved(node, place))
        return self._function(node, place)

    def _function(self, node: Any, place: _Place) -> _Place:
        lane, kind = place.lane, node.op_type
        if kind not in (*LINEAR, *POSITIVE, *ODD, *OTHER):
            raise _Fixed
        if kind in POOLS and place.axis != 1 - len(_sizes(node.inputs[0])):
            raise _Fixed
        if kind == "Cast" and node.attributes["to"].value not in (1, 10, 11, 16):  # floats
            raise _Fixed
        for value in node.inputs[1:] if kind not in ("CastLike", "Dropout") else ():
            if value is not None:
                self._across(value, place, "nothing")
        lane.rescaled &= kind in LINEAR or kind in POSITIVE
        lane.flipped &= kind in LINEAR or kind in ODD
        return place

    def _binary(self, node: Any) -> _Place:
        one, other = node.inputs
        product = node.op_type in ("Mul", "Div")
        if one in self.places and other in self.places:
            place, second = self.places[one], self.places[other]
            if place.axis != second.axis or place.lane.channels != second.lane.channels:
                raise _Fixed
            self.summed.append((place.lane, second.lane))
            if product:
                place.lane.keep_scale()
            return place
        place, constant = (self.places[one], other) if one in self.places else (self.places[other], one)
        follows = self._across(constant, place, "nothing" if product else "multiply")
        if (node.op_type == "Div" and constant is one) or (not product and not follows):
            place.lane.keep_scale()
        return place

    def _weight(self, node: Any) -> _Place | None:
        """Conv, ConvTranspose, Gemm and MatMul, whose weight an initializer is."""
        data, weight = node.inputs[0], self._stored(node.inputs[1])
        kind, groups = node.op_type, _attribute(node, "group", 1)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        matrix = kind in ("Gemm", "MatMul")
        if weight is None or bias in self.places or _attribute(node, "transA", 0):
            raise _Fixed
        rank = len(weight.shape)
        if rank != 2 if matrix else rank < 3:
            raise _Fixed
        first = kind == "Conv" or (kind == "Gemm" and _attribute(node, "transB", 0) == 1)  # filters on axis 0
        axis = -1 if matrix else 1 - rank
        into, filters = (1, 0) if first else (0, 1)
        place = self.places.get(data)
        if place is not None and place.axis != axis:
            self._fix(data)
            place = None
        if groups > 1 and (weight.shape[0] != groups or weight.shape[1] != 1):
            self._fix(data)
            if kind == "ConvTranspose":
                return None
            lane = self._lane(weight.shape[0], permuted=False)  # filters may be scaled, but belong to their group
        elif groups > 1:  # depthwise
            if place is not None and place.lane.channels == groups:
                lane = self._lane(groups)
                self.aligned.append((place.lane, lane))
                self._use(place.lane, weight, 0, "divide")
            else:
                self._fix(data)
                lane = self._lane(groups, permuted=False)
            filters = 0
        else:
            lane = self._lane(weight.shape[filters])
            if place is not None:
                self._use(place.lane, weight, into, "divide")
        self._use(lane, weight, filters, "multiply")
        if bias is not None:
            try:
                if not self._across(bias, _Place(lane, -1), "multiply") and self._number(bias) != 0.0:
                    lane.keep_scale()
            except _Fixed:
                lane.fix()
        return _Place(lane, axis)

    def _normalised(self, node: Any) -> _Place | None:
        """A normalisation takes up what is done to a channel before it, and begins a lane with its scale and bias."""
        data, scale, bias, mean, variance = (*node.inputs, None, None, None)[:5]
        place, batch = self.places.get(data), node.op_type == "BatchNormalization"
        if {scale, bias, mean, variance} & self.places.keys() or _attribute(node, "training_mode", 0):
            raise _Fixed
        whole = node.op_type in ("LayerNormalization", "RMSNormalization")  # whose scale lies like what it normalises
        if place is None or not (whole or place.axis == 1 - len(_sizes(data))):
            raise _Fixed
        axis = place.axis if whole else -1
        lane = self._lane(place.lane.channels)
        self.aligned.append((place.lane, lane))
        before, behind = _Place(place.lane, axis), _Place(lane, axis)
        scaled = self._across(scale, behind, "multiply")
        shifted = bias is None or self._across(bias, behind, "multiply") or self._number(bias) == 0.0
        if not (scaled and shifted):
            lane.keep_scale()
        followed = node.op_type == "InstanceNormalization"
        if batch:
            epsilon = node.attributes["epsilon"].value if "epsilon" in node.attributes else 1e-5
            followed = self._across(mean, before, "multiply") & self._across(variance, before, "variance", epsilon)
        place.lane.rescaled &= batch and followed
        place.lane.flipped &= followed and scaled
        if scaled and followed:
            self._across(scale, before, "sign")
        return _Place(lane, place.axis)

    def _embedding(self, node: Any) -> _Place | None:
        table = self._stored(node.inputs[0])
        if table is None or len(table.shape) != 2 or _attribute(node, "axis", 0) or node.inputs[1] in self.places:
            raise _Fixed
        lane = self._lane(table.shape[1])
        self._use(lane, table, 1, "multiply")
        return _Place(lane, -1)

    def _moved(self, node: Any, place: _Place) -> int:
        """The channel axis behind an operator that moves, joins or drops axes."""
        rank = len(_sizes(node.inputs[0]))
        axis = rank + place.axis
        if node.op_type == "Transpose":
            order = list(node.attributes["perm"].value) if "perm" in node.attributes else [*range(rank)][::-1]
            return order.index(axis) - rank
        if node.op_type in REDUCTIONS:
            given = _constant(node.inputs[1]) if len(node.inputs) > 1 else None
            if "axes" in node.attributes:  # until operator set 13 or 18
                given = np.asarray(node.attributes["axes"].value)
            gone = {int(each) % rank for each in ([] if given is None else given.ravel())}
            if not gone or axis in gone:
                raise _Fixed
            place.lane.flipped &= node.op_type in ("ReduceMean", "ReduceSum")
            return place.axis + (0 if _attribute(node, "keepdims", 1) else sum(each > axis for each in gone))
        before, behind = _sizes(node.inputs[0])[axis:], _sizes(node.outputs[0])
        for after in range(1, len(behind) + 1):  # the axis behind which as much lies, or that holds all of it
            if None not in (*before, *behind[-after:]) and math.prod(before) == math.prod(behind[-after:]):
                return -after
        raise _Fixed

    def _across(self, value: Any, place: _Place, effect: str, epsilon: float = 0.0) -> bool:
        """Whether a constant has numbers for each channel, which are then used; or else the same for all of them."""
        if value is None or value in self.places:
            raise _Fixed
        stored = self._stored(value)
        sizes = [1] if self._number(value) is not None else _sizes(value) if stored is None else list(stored.shape)
        if len(sizes) < -place.axis or sizes[place.axis] == 1:
            return False
        if stored is None:
            raise _Fixed
        self._use(place.lane, stored, len(sizes) + place.axis, effect, epsilon)
        return True

    def _use(self, lane: _Lane, stored: _Stored, axis: int, effect: str, epsilon: float = 0.0) -> None:
        if stored.shape[axis] % lane.channels:
            raise _Fixed
        lane.uses.append(Use(stored.name, stored.axes[axis], effect, epsilon))

    def _lane(self, channels: int, permuted: bool = True) -> _Lane:
        self.lanes.append(_Lane(channels, permuted=permuted))
        return self.lanes[-1]

    def _stored(self, value: Any) -> _Stored | None:
        """The floating initializer that a value is, perhaps transposed; None where anything else uses it as well."""
        axes: list[int] | None = None
        while value is not None:
            users = [node for node, place in value.uses() if node.op_type != "Shape" and (node.op_type, place) != CAST]
            if len(users) != 1 or users[0].graph is not self.graph or value.is_graph_output():
                return None
            node = value.producer()
            if node is None:
                held = value.const_value
                if held is None or not held.dtype.is_floating_point() or held.dtype.itemsize < 2:
                    return None
                shape = tuple(held.shape.numpy())
                axes = [*range(len(shape))] if axes is None else axes
                return _Stored(value.name, tuple(shape[axis] for axis in axes), tuple(axes))
            if node.op_type == "Transpose" and "perm" in node.attributes:
                order = node.attributes["perm"].value
                axes = [*order] if axes is None else [order[axis] for axis in axes]
            elif node.op_type != "Identity":
                return None
            value = node.inputs[0]
        return None

    def _number(self, value: Any) -> float | None:
        """The one number that a constant holds everywhere, or None."""
        held = _constant(value)
        return float(held.ravel()[0]) if held is not None and held.size == 1 else None


def _sizes(value: Any) -> list[Any]:
    """A value's shape, None for an axis of unknown size; _Fixed without one."""
    if value.shape is None:
        raise _Fixed
    return [size if isinstance(size, int) else None for size in value.shape]


def _constant(value: Any) -> NDArray[Any] | None:
    """The numbers that an initializer or a Constant holds, before it is spread or its shape changes."""
    while value is not None:
        if value.const_value is not None:
            return np.asarray(value.const_value.numpy())
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Constant":
            (held,) = node.attributes.values()
            return np.asarray(held.value.numpy() if hasattr(held.value, "numpy") else held.value)
        if node.op_type not in SPREADS:
            return None
        value = node.inputs[0]
    return None


def _attribute(node: Any, name: str, default: int) -> int:
    return int(node.attributes[name].value) if name in node.attributes else default
