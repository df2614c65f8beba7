"""An ONNX graph as it runs: functions inlined, the branch that is taken, nothing unused, and constants computed.

A weight may be written as any expression of constants, which ONNX Runtime computes when it loads a file, and what lies
in an unused part of the graph is no weight. So constant expressions are computed here too, by ONNX Runtime, each from
the nodes that it needs and without a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.inliner import inline_local_functions
from onnx_ir.passes.common import RemoveUnusedNodesPass

from wmengine._optional import require
from wmengine.suspects.graph_limits import check_operators

# Longer chains of copies are computed, not followed.
MAXIMUM_CHAIN = 16
# How often branches are decided by what other branches give.
MAXIMUM_ROUNDS = 8
DOMAINS = ("", "ai.onnx", "com.microsoft")
# What gives another value each time, or may never end.
_NEVER_COMPUTED = {"Bernoulli", "Loop", "Multinomial", "Scan"}
_NEVER_COMPUTED |= {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
# How a Constant holds its numbers where it holds no tensor.
_NUMBERS = ("value_float", "value_floats", "value_int", "value_ints")

Constants = dict[Any, NDArray[Any] | None]


class Graph:
    """The graph of an onnx.ModelProto; values and nodes are those of the IR.

    external: the bytes of the files that the model names, by location. Raises whatever a hostile graph makes the
    libraries raise.
    """

    def __init__(self, model: Any, external: Mapping[str, bytes]) -> None:
        model = _dense(inlined(model))
        self._external = external
        self._version, self._imports = model.ir_version, model.opset_import
        self._ir = onnx_ir.from_proto(model)
        self._ir.graph.sort()  # ONNX Runtime runs graphs whose nodes are listed out of order, so we must read them
        self._computed: Constants = {}
        _name_apart(self._ir.graph)
        self._take_branches()
        RemoveUnusedNodesPass()(self._ir)
        self._find_constants()

    def nodes(self) -> Iterator[Any]:
        """Those that work on the graph's inputs, in order of execution, subgraphs' among them."""
        return (node for node in self._nodes if not any(value in self._constants for value in node.outputs))

    def is_constant(self, value: Any) -> bool:
        """Whether a value depends on no input."""
        return value in self._constants

    def stored(self, value: Any) -> Any:
        """The tensor of an initializer or a Constant, unread, or None."""
        if value is None:
            return None
        tensor, node = value.const_value, value.producer()
        if tensor is None and node is not None and node.op_type == "Constant":
            if "value" in node.attributes:
                tensor = node.attributes["value"].value
            else:
                numbers = [node.attributes[name].value for name in _NUMBERS if name in node.attributes]
                tensor = onnx_ir.tensor(numbers[0]) if numbers else None
        if isinstance(tensor, onnx_ir.ExternalTensor):
            return onnx_ir.from_proto(self._loaded(tensor))
        return tensor

    def constant(self, value: Any) -> NDArray[Any] | None:
        """The array of a value that depends on no input; None for any other, and for one that cannot be computed."""
        tensor = self.stored(self.copied(value))
        if tensor is not None:
            return np.asarray(tensor.numpy())
        return self.computed([value])[value] if value in self._constants else None

    def computed(self, values: Iterable[Any]) -> Constants:
        """The arrays of values that depend on no input, in one session; None where ONNX Runtime cannot compute one."""
        wanted = list(dict.fromkeys(values))
        self._computed |= self._compute([value for value in wanted if value not in self._computed])
        return {value: self._computed[value] for value in wanted}

    def copied(self, value: Any) -> Any:
        """What a value is an Identity of: exporters write equal initializers once, with an Identity for each use."""
        for _ in range(MAXIMUM_CHAIN):
            node = None if value is None else value.producer()
            if node is None or node.op_type != "Identity" or node.domain not in DOMAINS:
                break
            value = node.inputs[0]
        return value

    def _take_branches(self) -> None:
        """Put in place of each If whose condition is constant the nodes of the branch that it takes."""
        undecidable: set[Any] = set()
        for _ in range(MAXIMUM_ROUNDS):
            self._find_constants()
            decided = [
                node
                for node in self._nodes
                if node.op_type == "If" and node.domain in DOMAINS and node not in undecidable
                if self.is_constant(node.inputs[0])
            ]
            if not decided:
                return
            conditions = self.computed(node.inputs[0] for node in decided if self.stored(node.inputs[0]) is None)
            for node in decided:
                condition = conditions.get(node.inputs[0], self.constant(node.inputs[0]))
                if condition is None or condition.size != 1:
                    undecidable.add(node)
                else:
                    _take(node, "then_branch" if condition.reshape(-1)[0] else "else_branch")

    def _find_constants(self) -> None:
        """All nodes in order of execution, and the values that depend on no input and can be computed."""

        self._nodes = list(self._ir.graph.all_nodes())
        self._constants = {value for graph in self._ir.graphs() for value in graph.initializers.values()}
        for node in self._nodes:  # one with graphs comes before the nodes inside it
            inner, used = _inside(node)
            computable = all(each.op_type not in _NEVER_COMPUTED for each in (node, *inner))
            if computable and all(value in self._constants for value in used):
                self._constants.update(node.outputs)

    def _compute(self, values: Sequence[Any]) -> Constants:
        if not values:
            return {}
        try:
            return dict(zip(values, self._run(values), strict=True))
        except MemoryError:
            raise
        except Exception:  # ONNX Runtime's exceptions share no base of their own
            if len(values) == 1:
                return {values[0]: None}
        half = len(values) // 2  # one that fails must not take the others with it
        return self._compute(values[:half]) | self._compute(values[half:])

    def _run(self, values: Sequence[Any]) -> list[NDArray[Any]]:
        """The arrays of constant values, by a model of the nodes that they need."""
        model = onnx.ModelProto(ir_version=self._version, opset_import=self._imports)
        model.graph.name = "constants"
        needed, seen, left = [], set(values), list(values)
        while left:
            value = left.pop()
            node = value.producer()
            if node is None:
                tensor = onnx_ir.to_proto(self.stored(value))
                tensor.name = value.name
                model.graph.initializer.append(tensor)
            elif node not in seen:
                needed.append(node)
                new = [each for each in _inside(node)[1] if each not in seen]
                seen.update(new, [node])
                left += new
        used = [each for node in needed for each in (node, *_inside(node)[0])]
        check_operators(model.graph.name, {(each.domain, each.op_type) for each in used})
        place = {node: number for number, node in enumerate(self._nodes)}
        model.graph.node.extend(onnx_ir.to_proto(node) for node in sorted(needed, key=place.__getitem__))
        model.graph.output.extend(onnx.ValueInfoProto(name=value.name) for value in values)
        return run_constants(model)

    def _loaded(self, tensor: Any) -> Any:
        """An external tensor's TensorProto, with its bytes in it."""
        stored, start = self._external[tensor.location], tensor.offset or 0
        stop = len(stored) if tensor.length is None else start + tensor.length
        return onnx.TensorProto(
            name=tensor.name, data_type=tensor.dtype.value, dims=list(tensor.shape), raw_data=stored[start:stop]
        )


def run_constants(model: Any) -> list[NDArray[Any]]:
    """The outputs of an onnx.ModelProto that takes no inputs, by ONNX Runtime, nothing optimised."""
    ort = require("onnxruntime", extra="cpu")
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(array) for array in session.run(None, {})]


def inlined(model: Any) -> Any:
    """An onnx.ModelProto, or where it defines functions another one that calls none."""
    if not model.functions:
        return model
    light = onnx.ModelProto()
    light.CopyFrom(model)
    for tensor in light.graph.initializer:  # their bytes stay here: they may be more than one message holds
        tensor.CopyFrom(onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0]))
    versions = {entry.domain: entry.version for entry in model.opset_import}
    for function in light.functions:  # one of another version is left as it is
        for entry in function.opset_import:
            entry.version = versions.get(entry.domain, entry.version)
    made = inline_local_functions(light)
    del made.graph.initializer[:]
    made.graph.initializer.extend(model.graph.initializer)
    return made


def _dense(model: Any) -> Any:
    """An onnx.ModelProto, or where it holds sparse tensors, which the IR does not know, another one that holds none."""

    def sparse_constants(graph: Any) -> list[Any]:
        return [each for node in graph.node for each in node.attribute if each.HasField("sparse_tensor")]

    if not any(graph.sparse_initializer or sparse_constants(graph) for graph in _graph_protos(model.graph)):
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for graph in _graph_protos(made.graph):
        for attribute in sparse_constants(graph):
            attribute.t.CopyFrom(_filled(attribute.sparse_tensor))
            attribute.ClearField("sparse_tensor")
            attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
        graph.initializer.extend(map(_filled, graph.sparse_initializer))
        del graph.sparse_initializer[:]
    return made


def _graph_protos(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _graph_protos(inner)


def _filled(sparse: Any) -> Any:
    """An onnx.SparseTensorProto as an onnx.TensorProto."""
    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    dense = np.zeros(math.prod(sparse.dims), values.dtype)
    dense[indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), tuple(sparse.dims))] = values
    return numpy_helper.from_array(dense.reshape(tuple(sparse.dims)), sparse.values.name)


def _name_apart(graph: Any) -> None:
    """Give each value a name of its own: two branches may use one name for different values."""

    named: dict[str, Any] = {}
    graphs = [graph, *graph.subgraphs()]
    given = [value for each in graphs for value in (*each.inputs, *each.initializers.values())]
    for value in (*given, *(value for node in graph.all_nodes() for value in node.outputs)):
        if value.name and named.setdefault(value.name, value) is not value:
            value.name = f"{value.name}#{len(named)}"
            named[value.name] = value


def _take(node: Any, branch: str) -> None:
    """Replace an If by the nodes of one of its branches."""
    graph, taken = node.graph, node.attributes[branch].value
    outputs, body = list(taken.outputs), list(taken)
    for value in list(taken.initializers.values()):
        del taken.initializers[value.name]
        graph.register_initializer(value)
    taken.outputs.clear()
    taken.remove(body)
    copies = [onnx_ir.node("Identity", [output]) for output in outputs]
    graph.insert_before(node, [*body, *copies])
    for before, copy in zip(node.outputs, copies, strict=True):
        copy.outputs[0].name = before.name
        onnx_ir.convenience.replace_all_uses_with(before, copy.outputs[0], replace_graph_outputs=True)
    graph.remove(node)


def _graphs(node: Any) -> Iterator[Any]:
    for attribute in node.attributes.values():
        if attribute.type == onnx_ir.AttributeType.GRAPH:
            yield attribute.value
        elif attribute.type == onnx_ir.AttributeType.GRAPHS:
            yield from attribute.value


def _inside(node: Any) -> tuple[list[Any], list[Any]]:
    """The nodes of a node's graphs, and the values that it takes, or these take from outside."""

    used, graphs = list(node.inputs), list(_graphs(node))
    inner = [each for graph in graphs for each in graph.all_nodes()]
    graphs += [graph for each in inner for graph in _graphs(each)]
    if graphs:
        own = {value for each in inner for value in each.outputs}
        own |= {value for graph in graphs for value in (*graph.inputs, *graph.initializers.values())}
        taken = [value for each in inner for value in each.inputs] + [v for graph in graphs for v in graph.outputs]
        used += [value for value in taken if value not in own]
    return inner, [value for value in used if value is not None]
