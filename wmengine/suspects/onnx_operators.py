"""Which operands of an operator are its weights, and how these lie, in ONNX and in what ONNX Runtime's tools write."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wmengine.suspects.onnx_blocked import DOMAIN, Blocked
from wmengine.suspects.onnx_graph import DOMAINS, Graph
from wmengine.suspects.onnx_layouts import unblocked
from wmengine.suspects.onnx_sources import Unreadable, attribute, input_of
from wmengine.suspects.weights import filters_first

Array = NDArray[np.float32]


class Operand(NamedTuple):
    """Where an operator takes a weight, that weight's scale and zero point, how it lies, where the operator takes what
    it multiplies by it, and which of a recurrent operator's directions it is of."""

    weight: int
    scale: int | None
    zero_point: int | None
    layout: str
    given: int | None = 0
    direction: int | None = None


_MATRIX = Operand(1, None, None, "matrix")
# Of the default domain and of com.microsoft, which holds what ONNX Runtime's optimiser and quantizer write.
_OPERANDS = {
    "Conv": [Operand(1, None, None, "conv")],
    "FusedConv": [Operand(1, None, None, "conv")],
    "NhwcConv": [Operand(1, None, None, "channels last")],
    "ConvTranspose": [Operand(1, None, None, "transposed")],
    "ConvInteger": [Operand(1, None, 3, "conv")],
    "QLinearConv": [Operand(3, 4, 5, "conv")],
    "Gemm": [_MATRIX],
    "FusedGemm": [_MATRIX],
    "GemmFastGelu": [_MATRIX],
    "QGemm": [Operand(3, 4, 5, "matrix")],
    "MatMul": [_MATRIX],
    "FusedMatMul": [_MATRIX],
    "QLinearMatMul": [Operand(3, 4, 5, "matrix")],
    "MatMulInteger": [Operand(1, None, 3, "matrix")],
    "DynamicQuantizeMatMul": [Operand(1, 2, 3, "matrix")],
    "MatMulIntegerToFloat": [Operand(1, 3, 5, "matrix")],
    "MatMulNBits": [Operand(1, 2, 3, "bits")],
    "MatMulBnb4": [Operand(1, 2, None, "codes")],
    "Attention": [_MATRIX],
    "PackedAttention": [_MATRIX],
    "DecoderMaskedSelfAttention": [_MATRIX],
    "QAttention": [Operand(1, 4, 7, "matrix")],
    "LongformerAttention": [_MATRIX, Operand(4, None, None, "matrix")],
    "DecoderAttention": [Operand(2, None, None, "matrix"), Operand(3, None, None, "matrix", 1)],
}
# Those of the input and of the state, which is no value of the graph.
_RECURRENT = [Operand(1, None, None, "gates"), Operand(2, None, None, "gates", None)]
_QUANTISED = [Operand(1, 8, 9, "gates last"), Operand(2, 10, 11, "gates last", None)]
# The order that torch has gates in: ONNX's i, o, f, c are i, f, g, o there, and its z, r, h are r, z, n.
_GATES = {"RNN": (0,), "GRU": (1, 0, 2), "LSTM": (0, 2, 3, 1), "DynamicQuantizeLSTM": (0, 2, 3, 1)}
BLOCKED = Operand(1, None, None, "blocked")
# What holds weights in ways of its own.
_UNREADABLE = ("MatMulFpQ4", "MoE", "QMoE", "QOrderedMatMul", "QOrderedAttention", "AttnLSTM")
_AXES = 64  # that an array may have
# What multiplies by its weight from the right, x·Wᵀ, but may as well hold one on the left.
_EITHER_SIDE = ("Gemm", "FusedGemm", "MatMul", "FusedMatMul")
# Those of matrices that attention does not multiply two computed values with.
_ALWAYS_WEIGHTS = ("Gemm", "FusedGemm", "QGemm")


def operands_of(graph: Graph, node: Any) -> list[Operand]:
    """A node's operands that are weights, or would be if they did not depend on the input."""
    if node.domain == DOMAIN:
        return [BLOCKED] if node.op_type == "Conv" else []
    if node.domain not in DOMAINS:
        return []
    if node.op_type in _GATES:
        directions = 2 if _text(node, "direction") == "bidirectional" else 1
        operands = _QUANTISED if node.op_type == "DynamicQuantizeLSTM" else _RECURRENT
        return [each._replace(direction=number) for number in range(directions) for each in operands]
    if node.op_type in _UNREADABLE:
        return [Operand(1, None, None, "unknown")]
    if node.op_type == "Einsum":
        constant = [place for place, value in enumerate(node.inputs) if graph.is_constant(value)]
        return [Operand(place, None, None, "einsum", 1 - place) for place in constant]
    operands = _OPERANDS.get(node.op_type, [])
    if node.op_type in _EITHER_SIDE and not graph.is_constant(input_of(node, 1)):
        return [each._replace(weight=0, given=1) for each in operands]
    return operands


def is_weight(graph: Graph, node: Any, operand: Operand) -> bool:
    """Whether a node's operand is one; Unreadable where it should be and is not constant, or no reader knows it."""
    if operand.layout == "unknown":
        raise Unreadable
    if operand.layout == "einsum":
        own, other, result = _terms(node, operand)
        return not set(own) <= set(other) & set(result)  # else it only scales
    if graph.is_constant(input_of(node, operand.weight)):
        return True
    if operand.layout == "matrix" and node.op_type not in _ALWAYS_WEIGHTS:
        return False
    raise Unreadable


def turning(node: Any, operand: Operand, blocked: Blocked | None) -> Callable[[Array], Array]:
    """What turns a node's operand to [O, I/groups, *kernel], filters on axis 0; values are moved and not changed, and
    but for those in blocks only viewed."""
    if operand.layout == "matrix":
        turned = attribute(node, "transA", 0) if operand.weight == 0 else not attribute(node, "transB", 0)

        def matrix(values: Array) -> Array:
            if values.ndim > 2 and set(values.shape[:-2]) == {1}:
                values = values.reshape(values.shape[-2:])
            return values.T if turned else values

        return matrix
    if operand.layout == "einsum":
        return _of_einsum(*_terms(node, operand))
    if operand.layout in ("gates", "gates last"):
        return partial(_of_gates, node, operand)
    if operand.layout == "channels last":
        return lambda values: np.moveaxis(values, -1, 1)
    if operand is BLOCKED:
        if blocked is None:
            raise Unreadable
        return partial(unblocked, **blocked._asdict())
    groups, transposed = attribute(node, "group", 1), operand.layout == "transposed"
    return lambda values: filters_first(values, groups, transposed) if values.ndim > 2 else values


def axes_fit(operand: Operand, shape: tuple[int, ...]) -> bool:
    """Whether a turned operand has the axes of a weight, which a vector that is multiplied by has not; Unreadable where
    it is many matrices."""
    if operand.layout in ("conv", "transposed", "channels last", "blocked"):
        return len(shape) > 2
    if len(shape) > 2:
        raise Unreadable
    return len(shape) == 2


def of_direction(node: Any, operand: Operand, factors: Array | None) -> Array | None:
    """A recurrent operator's scales or zero points, one or some for each direction: those of the operand's."""
    if factors is None or operand.direction is None:
        return factors
    directions = 2 if _text(node, "direction") == "bidirectional" else 1
    own: Array = factors.reshape(directions, -1)[operand.direction]
    return own


def gates_as_torch(node: Any, rows: Array) -> Array:
    """A turned operand's rows in the order that torch has them in: a recurrent one's gates are in another."""
    order = _GATES.get(node.op_type, (0,))
    if order == (0,):
        return rows
    gates = np.split(rows, len(order))
    return np.concatenate([gates[gate] for gate in order])


def alpha(node: Any) -> float:
    """What a node multiplies its product by."""
    scaled = node.op_type in _EITHER_SIDE and "alpha" in node.attributes
    return float(node.attributes["alpha"].value) if scaled else 1.0


def _of_gates(node: Any, operand: Operand, values: Array) -> Array:
    rows: Array = values[operand.direction]
    rows = rows.T if operand.layout == "gates last" else rows
    if rows.ndim != 2 or len(rows) % len(_GATES[node.op_type]):
        raise Unreadable
    return rows


def _terms(node: Any, operand: Operand) -> tuple[str, str, str]:
    """The axes of an Einsum's operand, of the other and of the result; Unreadable where there are more operands."""
    terms, _, result = _text(node, "equation").replace(" ", "").partition("->")
    operands = terms.split(",")
    if len(node.inputs) != 2 or len(operands) != 2 or not result or max(map(len, (*operands, result))) > _AXES:
        raise Unreadable
    return operands[operand.weight], operands[1 - operand.weight], result


def _of_einsum(own: str, other: str, result: str) -> Callable[[Array], Array]:
    """What turns an operand to a matrix where the equation is x·Wᵀ of it: each of its axes is summed with one of the
    other's, or is one of the result's."""
    rows = [axis for axis in result if axis in own and axis not in other]
    columns = [axis for axis in other if axis in own and axis not in result]
    if not rows or not columns or sorted(rows + columns) != sorted(own):
        raise Unreadable
    order = [own.index(axis) for axis in rows + columns]

    def matrix(values: Array) -> Array:
        values = values.transpose(order)
        return values.reshape(math.prod(values.shape[: len(rows)]), math.prod(values.shape[len(rows) :]))

    return matrix


def _text(node: Any, name: str) -> str:
    return str(node.attributes[name].value) if name in node.attributes else ""
