"""Where an operand's numbers come from: a stored tensor, behind steps that move or rescale it, or an expression."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wmengine.suspects.onnx_graph import DOMAINS, MAXIMUM_CHAIN, Graph
from wmengine.suspects.onnx_layouts import dequantised

Array = NDArray[np.float32]

# The operators between a stored weight and its use that only move or rescale values.
_CHAIN = ("Identity", "Cast", "QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape")


class Unreadable(Exception):
    """An operator has a weight that cannot be read."""


class Source(NamedTuple):
    """An operand that depends on no input: the IR value that holds its numbers (root), its shape, the type that is
    stored, and what reads it."""

    root: Any
    shape: tuple[int, ...]
    stored: str
    read: Callable[[], Array]


def source_of(graph: Graph, value: Any) -> Source:
    """Where a constant operand comes from; raises Unreadable for one that cannot be computed."""
    chain = chain_of(graph, value)
    if chain is None:
        array = graph.constant(value)
        if array is None or array.dtype.kind not in "fiub":
            raise Unreadable
        return Source(value, array.shape, "computed in the graph", lambda: array.astype(np.float32))
    tensor = graph.stored(chain[0])
    stored = str(tensor.dtype.numpy())
    for value in chain[1:]:
        kind = value.producer().op_type
        if kind == "QuantizeLinear":
            stored = "float32, quantised in the graph"
        elif kind == "DequantizeLinear" and not stored.endswith("in the graph"):
            stored = "quantised to integers"
    nothing = np.broadcast_to(np.float32(0), tuple(tensor.shape))
    return Source(chain[0], _moved(graph, chain, nothing).shape, stored, lambda: _values(graph, chain))


def chain_of(graph: Graph, value: Any) -> list[Any] | None:
    """The values from the initializer or Constant that this one is a copy of (the root) to this one, or None.

    Nothing is computed; each step but the first is the output of a node in _CHAIN whose other inputs are stored.
    """
    chain: list[Any] = []
    while value is not None and len(chain) <= MAXIMUM_CHAIN:
        chain.append(value)
        if graph.stored(value) is not None:
            return chain[::-1]
        node = value.producer()
        if node is None or node.domain not in DOMAINS or node.op_type not in _CHAIN:
            return None
        if any(given is not None and graph.stored(graph.copied(given)) is None for given in node.inputs[1:]):
            return None
        value = input_of(node, 0)
    return None


def _values(graph: Graph, chain: list[Any]) -> Array:
    """The values at the end of a chain."""
    values: Array = graph.stored(chain[0]).numpy().astype(np.float32, copy=False)
    quantised = False
    for before, value in pairwise(chain):
        node = value.producer()
        # Rounding aside, a QuantizeLinear here is undone by the DequantizeLinear behind it.
        quantised |= node.op_type == "QuantizeLinear"
        if node.op_type == "DequantizeLinear" and not quantised:
            scale, zero_point = floats(graph, input_of(node, 1)), floats(graph, input_of(node, 2))
            if scale is None:
                raise ValueError("DequantizeLinear of a weight has no constant scale")
            values = dequantised(
                values, scale, zero_point, attribute(node, "axis", 1), attribute(node, "block_size", 0)
            )
        values = _moved(graph, [before, value], values)
    return values


def _moved(graph: Graph, chain: list[Any], values: Array) -> Array:
    """Values after those steps of a chain that move them."""
    for value in chain[1:]:
        node = value.producer()
        if node.op_type == "Transpose":
            values = values.transpose(node.attributes["perm"].value if "perm" in node.attributes else None)
        elif node.op_type == "Reshape":
            shape = graph.constant(input_of(node, 1))
            if shape is None:
                raise ValueError("Reshape of a weight has no shape")
            sizes = [int(size) for size in shape]
            if not attribute(node, "allowzero", 0):
                sizes = [values.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
            values = values.reshape(sizes)
    return values


def floats(graph: Graph, value: Any) -> Array | None:
    """A scale, a zero point or a normalisation's numbers, float32, or None."""
    found = graph.constant(value)
    return None if found is None else found.astype(np.float32, copy=False)


def input_of(node: Any, index: int | None) -> Any:
    return node.inputs[index] if index is not None and index < len(node.inputs) else None


def attribute(node: Any, name: str, default: int) -> int:
    return int(node.attributes[name].value) if name in node.attributes else default
