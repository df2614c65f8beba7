"""What a graph may be before ONNX Runtime sees it: known operators, and no more nodes or outputs than a network has.

Nodes inside a function count as often as the function is used, because ONNX Runtime inlines it there: a kilobyte of
functions that call each other twice would otherwise keep it busy for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from wmengine.errors import SuspectError

MAXIMUM_NODES = 200_000
MAXIMUM_DEPTH = 8  # of graphs inside If, Loop and Scan
MAXIMUM_CALLS = 32  # of functions that call functions
MAXIMUM_OUTPUTS = 1000  # whoever looks for the answer among them compares them with each other

Called = tuple[str, str, str]  # a function's domain, name and overload

STANDARD_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft.nchwc")
# Of ONNX Runtime's own domain, what its optimiser and quantizer and exporters of trained networks write.
_MICROSOFT = """
Attention BiasAdd BiasGelu BiasSplitGelu Conv DequantizeLinear DynamicQuantizeLSTM DynamicQuantizeMatMul
EmbedLayerNormalization FastGelu FusedConv FusedGemm FusedMatMul FusedMatMulActivation Gelu GridSample GroupNorm
GroupQueryAttention Inverse LayerNormalization MatMulInteger16 MatMulIntegerToFloat MatMulNBits MultiHeadAttention
NhwcConv NhwcFusedConv NhwcMaxPool PackedAttention Pad QAttention QEmbedLayerNormalization QGemm QLinearAdd
QLinearAveragePool QLinearConcat QLinearConv QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearReduceMean
QLinearSigmoid QLinearSoftmax QLinearWhere QuantizeLinear QuickGelu RotaryEmbedding SimplifiedLayerNormalization
SkipGroupNorm SkipLayerNormalization SkipSimplifiedLayerNormalization SparseAttention Tokenizer TransposeMatMul
Trilu Unique
"""
MICROSOFT = frozenset(_MICROSOFT.split())


def check_graph(name: str, model: Any) -> None:
    """Raises SuspectError, naming the limit, for an onnx.ModelProto that is over one."""
    if len(model.graph.output) > MAXIMUM_OUTPUTS:
        raise SuspectError(f"{name} has {len(model.graph.output)} outputs, and at most {MAXIMUM_OUTPUTS} are looked at")
    functions: dict[Called, Any] = {}
    for each in model.functions:
        if functions.setdefault(_called(each.domain, each.name, each.overload), each) is not each:
            raise SuspectError(f"{name} defines the function {each.name!r} twice; export it again")
    counted: dict[Called, int] = {}

    def count(nodes: Any, depth: int, calls: tuple[Called, ...]) -> int:
        total = 0
        for node in nodes:
            called = _called(node.domain, node.op_type, node.overload)
            if called in functions:
                total += count_function(called, calls)
            else:
                _check_operator(name, node)
                total += 1
            for graph in _subgraphs(node):
                if depth == MAXIMUM_DEPTH:
                    raise SuspectError(f"{name} nests graphs more than {MAXIMUM_DEPTH} deep, as no real network does")
                total += count(graph.node, depth + 1, calls)
            if total > MAXIMUM_NODES:
                raise SuspectError(f"{name} has more than {MAXIMUM_NODES} nodes once its functions are inlined")
        return total

    def count_function(called: Called, calls: tuple[Called, ...]) -> int:
        if called in calls:
            raise SuspectError(f"{name} has a function {called[1]!r} that calls itself")
        if len(calls) == MAXIMUM_CALLS:
            raise SuspectError(f"{name} nests functions more than {MAXIMUM_CALLS} deep, as no real network does")
        if called not in counted:
            counted[called] = count(functions[called].node, 0, (*calls, called))
        return counted[called]

    count(model.graph.node, 0, ())


def _called(domain: str, name: str, overload: str) -> Called:
    """Which function a node means; "ai.onnx" is another name of the standard domain."""
    return "" if domain == "ai.onnx" else domain, name, overload


def _check_operator(name: str, node: Any) -> None:
    if node.domain in STANDARD_DOMAINS or (node.domain == "com.microsoft" and node.op_type in MICROSOFT):
        return
    raise SuspectError(
        f"{name} uses the operator {node.op_type!r} of domain {node.domain!r}, which is none that trained networks are "
        "exported with; export it with standard operators"
    )


def _subgraphs(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
