"""What a graph may be before it is read, and before ONNX Runtime sees it: how large, and of which operators.

Nodes inside a function count as often as the function is used, because ONNX Runtime inlines it there: a kilobyte of
functions that call each other twice would otherwise keep it busy for ever. What no output needs is no part of a graph
that is too large with it: whoever adds that to a copy would otherwise have taken it out of judgement.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from wmengine._optional import require
from wmengine.errors import SuspectError

MAXIMUM_NODES = 200_000
MAXIMUM_DEPTH = 8  # of graphs inside If, Loop and Scan
MAXIMUM_CALLS = 32  # of functions that call functions
MAXIMUM_OUTPUTS = 1000  # whoever looks for the answer among them compares them with each other

Called = tuple[str, str, str]  # a function's domain, name and overload

STANDARD_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft.nchwc")
# Of ONNX Runtime's own domain, what runs whole graphs as often as it likes, or hands them to other software.
REFUSED = ("BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch", "EPContext", "Snpe")


def check_graph(name: str, model: Any) -> set[tuple[str, str]]:
    """The operators of an onnx.ModelProto, each with its domain. Raises SuspectError, naming the limit it is over."""
    if len(model.graph.output) > MAXIMUM_OUTPUTS:
        raise SuspectError(f"{name} has {len(model.graph.output)} outputs, and at most {MAXIMUM_OUTPUTS} are looked at")
    functions: dict[Called, Any] = {}
    for each in model.functions:
        if functions.setdefault(_called(each.domain, each.name, each.overload), each) is not each:
            raise SuspectError(f"{name} defines the function {each.name!r} twice; export it again")
    counted: dict[Called, int] = {}
    operators: set[tuple[str, str]] = set()

    def count(nodes: Any, depth: int, calls: tuple[Called, ...]) -> int:
        total = 0
        for node in nodes:
            called = _called(node.domain, node.op_type, node.overload)
            if called in functions:
                total += count_function(called, calls)
            else:
                operators.add((node.domain, node.op_type))
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
    return operators


def without_unused(model: Any) -> bool:
    """Take the nodes that no output needs out of an onnx.ModelProto of too many, in place; whether there were any."""
    nodes = model.graph.node
    if len(nodes) <= MAXIMUM_NODES:
        return False
    makers = {name: number for number, node in enumerate(nodes) for name in node.output if name}
    needed: set[int] = set()
    left = [each.name for each in model.graph.output]
    while left:
        number = makers.get(left.pop())
        if number is not None and number not in needed:
            needed.add(number)
            left += _taken(nodes[number])
    places = itertools.count()
    nodes.sort(key=lambda _: next(places) not in needed)  # nothing is copied: a node may hold a large constant
    unused = len(needed) < len(nodes)
    del nodes[len(needed) :]
    return unused


def _taken(node: Any) -> Iterator[str]:
    """The names that a node takes, or that graphs inside it may take from outside."""
    yield from node.input
    for graph in _subgraphs(node):
        yield from (each.name for each in graph.output)
        for inner in graph.node:
            yield from _taken(inner)


def _called(domain: str, name: str, overload: str) -> Called:
    """Which function a node means; "ai.onnx" is another name of the standard domain."""
    return "" if domain == "ai.onnx" else domain, name, overload


def check_operators(name: str, operators: Iterable[tuple[str, str]]) -> None:
    """Raises SuspectError for an operator that is run neither by a standard nor by ONNX Runtime itself."""
    for domain, operator in sorted(operators):
        if domain not in STANDARD_DOMAINS and not (domain == "com.microsoft" and operator in _own_operators()):
            raise SuspectError(
                f"{name} uses the operator {operator!r} of domain {domain!r}, which is none that trained networks are "
                "exported with; export it with standard operators"
            )


@cache
def _own_operators() -> frozenset[str]:
    """ONNX Runtime's, as its registry has them: its quantizers and optimisers write new ones with every version."""
    runtime = require("onnxruntime.capi.onnxruntime_pybind11_state", extra="cpu")
    own = {each.name for each in runtime.get_all_operator_schema() if each.domain == "com.microsoft"}
    return frozenset(own.difference(REFUSED))


def _subgraphs(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
