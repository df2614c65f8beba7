"""The weights inside an ONNX graph, in order of execution, filters on axis 0 and dequantised, each read when asked for.

Exporters rename weights, transpose them (a Linear becomes `MatMul(x, val_31)`), store them as int8 with scales, or in
float16. So a weight is found from the operator that uses it. Its operand is followed back through chains that only move
or rescale values to an initializer or a Constant, or computed where it is another expression of constants, and turned
to the orientation that torch has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import ValueInfoProto

from wmengine.errors import OtherTask, SuspectError
from wmengine.facts import Fact, fact
from wmengine.suspects.base import Tensor, Weight, one_line
from wmengine.suspects.onnx_blocked import Blocked, blocked_convolutions
from wmengine.suspects.onnx_graph import DOMAINS, MAXIMUM_CHAIN, Graph, inlined
from wmengine.suspects.onnx_layouts import PACKED_BITS, from_bits, from_codes, per_axis
from wmengine.suspects.onnx_operators import (
    Operand,
    alpha,
    axes_fit,
    gates_as_torch,
    is_weight,
    of_direction,
    operands_of,
    turning,
)
from wmengine.suspects.onnx_sources import Source, Unreadable, attribute, chain_of, floats, input_of, source_of

Array = NDArray[np.float32]


class _Found(NamedTuple):
    """A weight, how it is stored, and the value that is multiplied by it."""

    tensor: Tensor
    stored: str
    given: Any


def read_tensors(name: str, model: Any, external: Mapping[str, bytes] | None = None) -> tuple[list[Tensor], list[Fact]]:
    """The weights of an onnx.ModelProto, each once, and what was assumed.

    external: the bytes of the files that it names, by location. Raises SuspectError when the graph cannot be read; so
    does reading one of the tensors that it finds.
    """
    found, unread = _walk(name, model, external or {})
    stored: dict[str, int] = {}
    for each in found:
        stored[each.stored] = stored.get(each.stored, 0) + 1
    facts = [
        fact("stored_as", count=count, of=len(found), kind=kind) for kind, count in stored.items() if kind != "float32"
    ]
    return [each.tensor for each in found], [*facts, *([fact("unread", count=unread)] if unread else [])]


def with_activation(name: str, proto: Any, model: Any, external: Mapping[str, bytes], place: int) -> tuple[str, bytes]:
    """The name of the value that goes into the weight at `place`, and the model's bytes with that value as an output.

    proto: the onnx.ModelProto as it is stored; model, external: as for `read_tensors`.
    """
    found, _ = _walk(name, model, external)
    if place >= len(found):
        raise OtherTask(f"{name} has {len(found)} weights, and the mark is in number {place + 1}")
    value = found[place].given
    if value is None or not value.name:
        raise OtherTask(f"{name} has a weight {place + 1} into which nothing goes that can be read")
    tapped = inlined(proto)
    if value.name not in {output.name for output in tapped.graph.output}:
        tapped.graph.output.append(ValueInfoProto(name=value.name))
    return str(value.name), tapped.SerializeToString()


def _walk(name: str, model: Any, external: Mapping[str, bytes]) -> tuple[list[_Found], int]:
    """Every weight once, in order of execution, and how many operators have one that cannot be read."""
    try:
        graph = Graph(model, external)
        users = [(node, operand) for node in graph.nodes() for operand in operands_of(graph, node)]
        graph.computed(value for node, operand in users for value in _expressions(graph, node, operand))
        blocked = blocked_convolutions(graph)
        found: dict[Any, _Found] = {}
        unread = 0
        for node, operand in users:
            try:
                read = _weight(name, graph, node, operand, blocked) if is_weight(graph, node, operand) else None
                if read is not None:
                    found.setdefault(*read)
            except MemoryError:
                raise
            except Exception:  # Unreadable, or a chain that ONNX Runtime would not run through either
                unread += 1
    except MemoryError:
        raise
    except Exception as error:  # a hostile graph can fail anywhere in there
        raise SuspectError(f"{name} has a graph that cannot be read ({one_line(error)}); export it again") from None
    return list(found.values()), unread


def _expressions(graph: Graph, node: Any, operand: Operand) -> Iterator[Any]:
    """The constants that reading a node's weight takes and that must be computed."""
    values = [input_of(node, place) for place in (operand.weight, operand.scale, operand.zero_point)]
    for consumer in _consumers(graph, node):
        values += [input_of(consumer, 1), input_of(consumer, 4)]
    for value in values:
        if value is not None and graph.is_constant(value) and chain_of(graph, value) is None:
            yield value


def _weight(
    name: str, graph: Graph, node: Any, operand: Operand, blocked: Mapping[Any, Blocked]
) -> tuple[Any, _Found] | None:
    """A weight of a node, with what tells it from others; None where it has no weight's axes."""
    source = source_of(graph, input_of(node, operand.weight))
    turn = turning(node, operand, blocked.get(node))
    if operand.layout in _PACKED:
        shape = _packed_shape(graph, node, source)
    else:
        shape = turn(np.broadcast_to(np.float32(0), source.shape)).shape
        if 0 in shape or not axes_fit(operand, shape):
            return None

    def read() -> Weight:
        try:
            if operand.layout in _PACKED:
                rows = _PACKED[operand.layout](graph, node, source)
            else:
                rows = gates_as_torch(node, _rescaled(graph, node, operand, turn(source.read())))
            factors = None if operand.direction is not None else _factors(graph, node, len(rows))
            return np.ascontiguousarray(rows, np.float32), factors
        except MemoryError:
            raise
        except Exception as error:  # a hostile tensor can fail anywhere in there
            raise SuspectError(f"{name} has a weight that cannot be read ({one_line(error)})") from None

    quantised = operand.layout in _PACKED or _scale(graph, node, operand) is not None
    tensor = Tensor.unread(shape, str(source.root.name), read)
    stored = "quantised to integers" if quantised else source.stored
    return (source.root, operand.direction), _Found(tensor, stored, input_of(node, operand.given))


def _rescaled(graph: Graph, node: Any, operand: Operand, rows: NDArray[Any]) -> NDArray[Any]:
    """Rows as the operator multiplies by them. A quantised one has one scale, or one for each filter."""
    zero_point = of_direction(node, operand, floats(graph, input_of(node, operand.zero_point)))
    if zero_point is not None:
        rows = rows - per_axis(zero_point, rows.shape, 0)
    scale = of_direction(node, operand, _scale(graph, node, operand))
    if scale is not None:
        rows = rows * per_axis(scale, rows.shape, 0)
    return rows if alpha(node) == 1.0 else rows * np.float32(alpha(node))


def _packed_shape(graph: Graph, node: Any, source: Source) -> tuple[int, int]:
    """[N, K] of a MatMulNBits or a MatMulBnb4 whose operands are as its attributes say."""
    rows, columns = attribute(node, "N", 0), attribute(node, "K", 0)
    bits, block = attribute(node, "bits", 4), attribute(node, "block_size", 0)
    scales = input_of(node, 2)
    if min(rows, columns, block) < 1 or not graph.is_constant(scales):
        raise Unreadable
    if node.op_type == "MatMulBnb4":
        if math.prod(source.shape) != -(-rows * columns // 2) or attribute(node, "quant_type", 0) not in (0, 1):
            raise Unreadable
        return rows, columns
    permuted = input_of(node, 4) is not None
    if permuted or bits not in PACKED_BITS:
        raise Unreadable
    if source.shape != (rows, -(-columns // block), block * bits // 8):
        raise Unreadable
    return rows, columns


def _from_bits(graph: Graph, node: Any, source: Source) -> Array:
    scales, zero_points = floats(graph, input_of(node, 2)), graph.constant(input_of(node, 3))
    if scales is None:
        raise ValueError("MatMulNBits has no scales that can be computed")
    packed = source.read().astype(np.uint8)
    return from_bits(packed, scales, zero_points, attribute(node, "bits", 4), attribute(node, "K", 0))


def _from_codes(graph: Graph, node: Any, source: Source) -> Array:
    rows, columns = shape = attribute(node, "N", 0), attribute(node, "K", 0)
    largest, block = floats(graph, input_of(node, 2)), attribute(node, "block_size", 0)
    if largest is None or largest.size != -(-rows * columns // block):
        raise ValueError("MatMulBnb4 has no scales that can be computed")
    packed = source.read().astype(np.uint8).reshape(-1)
    return from_codes(packed, largest, shape, block, attribute(node, "quant_type", 0))


_PACKED: dict[str, Callable[[Graph, Any, Source], Array]] = {"bits": _from_bits, "codes": _from_codes}


def _factors(graph: Graph, node: Any, filters: int) -> Array | None:
    """What the normalisation right behind a node multiplies its filters by, float32 [filters]; None without one."""
    for consumer in _consumers(graph, node):
        if consumer.op_type not in ("BatchNormalization", "InstanceNormalization"):
            continue
        scale = _spread(graph, input_of(consumer, 1), filters)
        if consumer.op_type == "InstanceNormalization" or scale is None:
            return scale
        variance = _spread(graph, input_of(consumer, 4), filters)
        if variance is not None:
            epsilon = consumer.attributes["epsilon"].value if "epsilon" in consumer.attributes else 1e-5
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.asarray(scale / np.sqrt(variance + np.float32(epsilon)), np.float32)
    return None


def _spread(graph: Graph, value: Any, filters: int) -> Array | None:
    """A constant of one number for each filter, float32 [filters], also where the graph expands it from one; or None.

    Exporters write so the ones of a normalisation that has no scale of its own.
    """
    for _ in range(MAXIMUM_CHAIN):
        node = None if value is None else value.producer()
        if node is None or node.domain not in DOMAINS or node.op_type not in ("Expand", "CastLike", "Cast", "Identity"):
            break
        value = input_of(node, 0)
    found = floats(graph, value)
    if found is None or found.size not in (1, filters):
        return None
    return np.ascontiguousarray(np.broadcast_to(found.reshape(-1), (filters,)))


def _consumers(graph: Graph, node: Any, left: int = 2) -> list[Any]:
    """The nodes that use what a node gives, through those that add a constant bias to it."""
    found = []
    for consumer in node.outputs[0].consumers() if node.outputs else ():
        if left and consumer.domain in DOMAINS and consumer.op_type in ("Add", "Identity"):
            others = [value for value in consumer.inputs if value is not node.outputs[0]]
            if all(graph.is_constant(value) for value in others):
                found += _consumers(graph, consumer, left - 1)
        elif consumer.domain in DOMAINS:
            found.append(consumer)
    return found


def _scale(graph: Graph, node: Any, operand: Operand) -> Array | None:
    """The scale of a quantised operator's weight: an input of it, or for ConvInteger and MatMulInteger, which have
    none, what their Cast is multiplied by: Mul(input's scale, weight's scale)."""
    if operand.scale is not None:
        return floats(graph, input_of(node, operand.scale))
    if node.op_type not in ("ConvInteger", "MatMulInteger"):
        return None
    for cast in node.outputs[0].consumers():
        for product in cast.outputs[0].consumers() if cast.op_type == "Cast" else ():
            for factor in product.inputs if product.op_type == "Mul" else ():
                scales = factor.producer() if factor is not None else None
                if scales is not None and scales.op_type == "Mul":
                    constants = [value for value in scales.inputs if graph.is_constant(value)]
                    if len(constants) == 1:
                        scale = floats(graph, constants[0])
                        return None if scale is None else scale.reshape(-1)
    return None
