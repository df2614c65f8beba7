"""The weights inside an ONNX graph, in order of execution, filters on axis 0 and dequantised, read without running it.

Exporters rename weights, transpose them (a Linear becomes `MatMul(x, val_31)`), store them as int8 with scales, or in
float16. So a weight is found from the operator that uses it: its operand is followed back through chains that only move
or rescale values, to an initializer or a Constant, and turned to the orientation that torch has.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wmengine.errors import OtherTask, SuspectError
from wmengine.facts import Fact, fact
from wmengine.suspects.base import Tensor, one_line
from wmengine.suspects.weights import filters_first

# Longer chains are not what exporters write.
MAXIMUM_CHAIN = 16
# How a Constant holds its numbers where it holds no tensor.
_NUMBERS = ("value_float", "value_floats", "value_int", "value_ints")


class _Operand(NamedTuple):
    """Where an operator takes its weight, that weight's scale and zero point, and how the weight lies."""

    weight: int
    scale: int | None
    zero_point: int | None
    layout: str


# Of the default domain and of com.microsoft, which holds what ONNX Runtime's optimiser and quantizer write.
OPERATORS = {
    "Conv": _Operand(1, None, None, "conv"),
    "FusedConv": _Operand(1, None, None, "conv"),
    "ConvTranspose": _Operand(1, None, None, "transposed"),
    "ConvInteger": _Operand(1, None, 3, "conv"),
    "QLinearConv": _Operand(3, 4, 5, "conv"),
    "Gemm": _Operand(1, None, None, "matrix"),
    "FusedGemm": _Operand(1, None, None, "matrix"),
    "QGemm": _Operand(3, 4, 5, "matrix"),
    "MatMul": _Operand(1, None, None, "matrix"),
    "FusedMatMul": _Operand(1, None, None, "matrix"),
    "QLinearMatMul": _Operand(3, 4, 5, "matrix"),
    "MatMulInteger": _Operand(1, None, 3, "matrix"),
    "DynamicQuantizeMatMul": _Operand(1, 2, 3, "matrix"),
    "MatMulIntegerToFloat": _Operand(1, 3, 5, "matrix"),
}
DOMAINS = ("", "ai.onnx", "com.microsoft")
# The operators between a stored weight and its use that only move or rescale values.
CHAIN = ("Identity", "Cast", "QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape")


@dataclass(frozen=True)
class _Weight:
    """An operand's values as float32, the IR value that holds them (root), and the type that it stores."""

    root: Any
    values: NDArray[np.float32]
    stored: str


def read_tensors(name: str, model: Any) -> tuple[list[Tensor], list[Fact]]:
    """The weights of an onnx.ModelProto (external data already in it), each once, and what was assumed.

    Raises SuspectError when the graph cannot be read.
    """
    try:
        found, blocked = _walk(model)
    except Exception as error:  # a hostile graph can fail anywhere in there
        raise SuspectError(f"{name} has a graph that cannot be read ({one_line(error)}); export it again") from None
    stored: dict[str, int] = {}
    for each in found:
        stored[each.stored] = stored.get(each.stored, 0) + 1
    facts = [
        fact("stored_as", count=count, of=len(found), kind=kind) for kind, count in stored.items() if kind != "float32"
    ]
    return [each.tensor for each in found], [*facts, *([fact("blocked", count=blocked)] if blocked else [])]


def with_activation(name: str, proto: Any, model: Any, place: int) -> tuple[str, bytes]:
    """The name of the value that goes into the weight at `place`, and the model's bytes with that value as an output.

    proto: the onnx.ModelProto as it is stored, to be written into; model: the same with external data in it.
    """
    from onnx import ValueInfoProto

    try:
        found, _ = _walk(model)
    except Exception as error:  # a hostile graph can fail anywhere in there
        raise SuspectError(f"{name} has a graph that cannot be read ({one_line(error)}); export it again") from None
    if place >= len(found):
        raise OtherTask(f"{name} has {len(found)} weights, and the mark is in number {place + 1}")
    value = found[place].given
    if value is None or not value.name:
        raise OtherTask(f"{name} has a weight {place + 1} into which nothing goes that can be read")
    if value.name not in {output.name for output in proto.graph.output}:
        proto.graph.output.append(ValueInfoProto(name=value.name))
    return str(value.name), proto.SerializeToString()


class _Found(NamedTuple):
    """A weight, how it is stored, and the value that is multiplied by it."""

    tensor: Tensor
    stored: str
    given: Any


def _walk(model: Any) -> tuple[list[_Found], int]:
    """Every weight once, in order of execution, and how many convolutions are in a layout that is not read."""
    import onnx_ir

    graph = onnx_ir.from_proto(model).graph
    graph.sort()  # ONNX Runtime runs graphs whose nodes are listed out of order, so we must read them
    found: dict[Any, _Found] = {}
    rejected: set[Any] = set()
    blocked = 0
    for node in onnx_ir.traversal.RecursiveGraphIterator(graph):
        blocked += node.domain == "com.microsoft.nchwc" and node.op_type == "Conv"
        operand = OPERATORS.get(node.op_type) if node.domain in DOMAINS else None
        if operand is None:
            continue
        weight, oriented, given = _read_weight(node, operand, found, rejected)
        if weight is None or oriented is None:
            continue
        values = np.ascontiguousarray(oriented, dtype=np.float32)
        tensor = Tensor(values, str(weight.root.name), _factors(node, len(values)))
        stored = "quantised to integers" if _scale(node, operand) is not None else weight.stored
        found[weight.root] = _Found(tensor, stored, given)
    return list(found.values()), blocked


def _factors(node: Any, filters: int) -> NDArray[np.float32] | None:
    """What the normalisation right behind a node multiplies its filters by, float32 [filters]; None without one."""
    for consumer in _consumers(node):
        if consumer.op_type not in ("BatchNormalization", "InstanceNormalization"):
            continue
        scale = _spread(_input(consumer, 1), filters)
        if consumer.op_type == "InstanceNormalization" or scale is None:
            return scale
        variance = _spread(_input(consumer, 4), filters)
        if variance is not None:
            epsilon = consumer.attributes["epsilon"].value if "epsilon" in consumer.attributes else 1e-5
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.asarray(scale / np.sqrt(variance + np.float32(epsilon)), np.float32)
    return None


def _spread(value: Any, filters: int) -> NDArray[np.float32] | None:
    """A constant of one number for each filter, float32 [filters], also where the graph expands it from one; or None.

    Exporters write so the ones of a normalisation that has no scale of its own.
    """
    for _ in range(MAXIMUM_CHAIN):
        node = None if value is None else value.producer()
        if node is None or node.domain not in DOMAINS or node.op_type not in ("Expand", "CastLike", "Cast", "Identity"):
            break
        value = _input(node, 0)
    found = _constant(value)
    if found is None or found.size not in (1, filters):
        return None
    return np.ascontiguousarray(np.broadcast_to(found.reshape(-1), (filters,)))


def _consumers(node: Any, left: int = 2) -> list[Any]:
    """The nodes that use what a node gives, through those that add a constant bias to it."""
    found = []
    for consumer in node.outputs[0].consumers() if node.outputs else ():
        if left and consumer.domain in DOMAINS and consumer.op_type in ("Add", "Identity"):
            others = [value for value in consumer.inputs if value is not node.outputs[0]]
            if all(_is_constant(value) for value in others):
                found += _consumers(consumer, left - 1)
        elif consumer.domain in DOMAINS:
            found.append(consumer)
    return found


def _read_weight(
    node: Any, operand: _Operand, found: Container[Any], rejected: set[Any]
) -> tuple[_Weight | None, NDArray[np.float32] | None, Any]:
    """The stored weight of a node, its values as [O, I/groups, *kernel], dequantised, and what is multiplied by it.

    None where there is none, or its root is in `found`. What has no weight's shape goes to `rejected`: a value is
    computed once, however many nodes use it.
    """
    matrix = operand.layout == "matrix"
    value = _input(node, operand.weight)
    left = matrix and operand.weight == 1 and _chain(value) is None  # W·x, where x·Wᵀ is usual
    if left:
        value = _input(node, 0)
    chain = _chain(value)
    if chain is None or chain[0] in found or (value, matrix) in rejected:
        return None, None, None
    weight = _follow(chain)
    if weight.values.size == 0 or (weight.values.ndim != 2 if matrix else weight.values.ndim < 3):
        rejected.add((value, matrix))
        return None, None, None
    if matrix:
        turned = _attribute(node, "transA", 0) if left else not _attribute(node, "transB", 0)
        rows = weight.values.T if turned else weight.values
    else:
        rows = filters_first(weight.values, _attribute(node, "group", 1), operand.layout == "transposed")
    # A quantised operator has one scale, or one for each filter: filters are on axis 0 by now.
    zero_point = _constant(_input(node, operand.zero_point))
    if zero_point is not None:
        rows = rows - _per_axis(zero_point, rows.shape, 0)
    scale = _scale(node, operand)
    given = _input(node, 1 if left else 0)
    return weight, rows if scale is None else rows * _per_axis(scale, rows.shape, 0), given


def _scale(node: Any, operand: _Operand) -> NDArray[np.float32] | None:
    """The scale of a quantised operator's weight: an input of it, or for ConvInteger and MatMulInteger, which have
    none, what their Cast is multiplied by: Mul(input's scale, weight's scale)."""
    if operand.scale is not None:
        return _constant(_input(node, operand.scale))
    if node.op_type not in ("ConvInteger", "MatMulInteger"):
        return None
    for cast in node.outputs[0].consumers():
        for product in cast.outputs[0].consumers() if cast.op_type == "Cast" else ():
            for factor in product.inputs if product.op_type == "Mul" else ():
                scales = factor.producer() if factor is not None else None
                if scales is not None and scales.op_type == "Mul":
                    constants = [value for value in map(_constant, scales.inputs) if value is not None]
                    if len(constants) == 1:
                        return constants[0].reshape(-1)
    return None


def _stored(value: Any) -> Any:
    """The tensor of an initializer or a Constant, unread, or None."""
    import onnx_ir

    if value is None or value.const_value is not None:
        return None if value is None else value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant":
        return None
    if "value" in node.attributes:
        return node.attributes["value"].value
    numbers = [node.attributes[name].value for name in _NUMBERS if name in node.attributes]
    return onnx_ir.tensor(numbers[0]) if numbers else None


def _chain(value: Any) -> list[Any] | None:
    """The values from the initializer or Constant that this one is a copy of (the root) to this one, or None.

    Nothing is computed; each step but the first is the output of a node in CHAIN whose other inputs are constants.
    """
    chain: list[Any] = []
    while value is not None and len(chain) <= MAXIMUM_CHAIN:
        chain.append(value)
        if _stored(value) is not None:
            return chain[::-1]
        node = value.producer()
        if node is None or node.domain not in DOMAINS or node.op_type not in CHAIN:
            return None
        if any(given is not None and not _is_constant(given) for given in node.inputs[1:]):
            return None
        value = _input(node, 0)
    return None


def _follow(chain: list[Any]) -> _Weight:
    """The values at the end of a chain."""
    array = _stored(chain[0]).numpy()
    values, stored = array.astype(np.float32, copy=False), str(array.dtype)
    for value in chain[1:]:
        node = value.producer()
        # Rounding aside (a QuantizeLinear here is undone by the DequantizeLinear behind it) the others keep the values.
        if node.op_type == "QuantizeLinear":
            stored = "float32, quantised in the graph"
        elif node.op_type == "DequantizeLinear":
            if not stored.endswith("in the graph"):
                values, stored = _dequantised(node, values), "quantised to integers"
        elif node.op_type == "Transpose":
            values = values.transpose(node.attributes["perm"].value if "perm" in node.attributes else None)
        elif node.op_type == "Reshape":
            shape = _constant(_input(node, 1))
            if shape is None:
                raise ValueError("Reshape of a weight has no shape")
            sizes = [int(size) for size in shape]
            if not _attribute(node, "allowzero", 0):
                sizes = [values.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
            values = values.reshape(sizes)
    return _Weight(chain[0], values, stored)


def _dequantised(node: Any, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """(q − zero point) · scale, with one scale, one for each index of an axis, or one for each block along it."""
    scale, zero_point = _constant(_input(node, 1)), _constant(_input(node, 2))
    axis, block = _attribute(node, "axis", 1), _attribute(node, "block_size", 0)
    if scale is None:
        raise ValueError("DequantizeLinear of a weight has no constant scale")

    def spread(factor: NDArray[np.float32]) -> NDArray[np.float32]:
        if block <= 0 or factor.ndim != values.ndim:
            return _per_axis(factor, values.shape, axis)
        blocks = list(values.shape)
        blocks[axis] = -(-blocks[axis] // block)
        if list(factor.shape) != blocks:
            raise ValueError(f"{list(factor.shape)} factors do not fit {blocks} blocks")
        return factor.take(np.arange(values.shape[axis]) // block, axis=axis)

    return (values if zero_point is None else values - spread(zero_point)) * spread(scale)


def _per_axis(factor: NDArray[np.float32], shape: tuple[int, ...], axis: int) -> NDArray[np.float32]:
    """A factor for a whole tensor of this shape, or one for each index of an axis; it never makes the tensor larger."""
    if factor.size == 1:
        return factor.reshape(())
    if factor.size != shape[axis]:
        raise ValueError(f"{factor.size} factors do not fit an axis of length {shape[axis]}")
    along = [1] * len(shape)
    along[axis] = factor.size
    return factor.reshape(along)


def _is_constant(value: Any) -> bool:
    return _stored(_copied(value)) is not None


def _constant(value: Any) -> NDArray[np.float32] | None:
    """A scale, a zero point or a shape: an initializer or a Constant, as float32, or None."""
    tensor = _stored(_copied(value))
    return None if tensor is None else tensor.numpy().astype(np.float32, copy=False)


def _copied(value: Any) -> Any:
    """What a value is an Identity of: exporters write equal initializers once, with an Identity for each other use."""
    for _ in range(MAXIMUM_CHAIN):
        node = None if value is None else value.producer()
        if node is None or node.op_type != "Identity" or node.domain not in DOMAINS:
            break
        value = _input(node, 0)
    return value


def _input(node: Any, index: int | None) -> Any:
    return node.inputs[index] if index is not None and index < len(node.inputs) else None


def _attribute(node: Any, name: str, default: int) -> int:
    return int(node.attributes[name].value) if name in node.attributes else default
