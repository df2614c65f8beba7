"""ONNX Runtime's blocked convolutions (NCHWc): in how many channels a file's lie, and which of these only fill a block.

A file says neither. Blocks are of 8 channels where it was written on a processor with AVX2, of 16 with AVX-512, and
the last of them is filled with zeros, which a pruned filter is too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import ValueInfoProto, helper, numpy_helper

from wmengine.suspects.onnx_graph import Graph, run_constants
from wmengine.suspects.onnx_layouts import unblocked
from wmengine.suspects.onnx_sources import Source, attribute, floats, input_of, source_of

DOMAIN = "com.microsoft.nchwc"
_BLOCKS = (8, 16)
# By how many standard deviations filters must differ more in one reading than in the other.
_CLEARLY = 3.0


class Blocked(NamedTuple):
    """How a convolution's weight lies: the channels of a block, and how many filters and input channels it has."""

    block: int
    filters: int
    channels: int


def blocked_convolutions(graph: Graph) -> dict[Any, Blocked]:
    """The convolutions of a graph that lie in blocks, without those whose weight cannot be read."""
    sources: dict[Any, Source] = {}
    roots: set[Any] = set()
    for node in graph.nodes():
        if (node.domain, node.op_type) == (DOMAIN, "Conv") and graph.is_constant(input_of(node, 1)):
            try:
                source = source_of(graph, input_of(node, 1))
                if source.root not in roots:
                    source.read()  # so that one that cannot be read keeps none of the others from being read
                    roots.add(source.root)
                readable = len(source.shape) == 4 and 0 not in source.shape and node.inputs[0] is not None
            except MemoryError:
                raise
            except Exception:  # Unreadable, or a chain that ONNX Runtime would not run through either
                continue
            if readable:
                sources[node] = source
    possible = [block for block in _BLOCKS if all(_fits(node, each.shape, block) for node, each in sources.items())]
    if not sources or not possible:
        return {}
    block = possible[0] if len(possible) == 1 else _told_apart({each.root: each for each in sources.values()}.values())
    filling = _Filling(graph, sources, block)
    found = {}
    for node, source in sources.items():
        filters, channels = source.shape[:2]
        within = attribute(node, "group", 1) == 1 and channels % block == 0
        spare = filling.of(node.inputs[0]) if within else 0
        found[node] = Blocked(block, filters - filling.of(node.outputs[0]), channels - spare)
    return found


def _fits(node: Any, shape: tuple[int, ...], block: int) -> bool:
    filters, channels = shape[:2]
    if filters % block:
        return False
    if attribute(node, "group", 1) > 1:
        return channels == 1 or channels % block == 0
    before = node.inputs[0].producer()
    inside = before is not None and before.domain == DOMAIN
    return channels % block == 0 or (channels < block and not inside)


def _told_apart(sources: Iterable[Source]) -> int:
    """The block under which filters, and input channels, differ more in their norms: the wrong one mixes pairs of them.
    Where that is not clear, as in a network that was never trained, the block of the machine that reads.

    The energies of n filters, in units of their mean, have a variance V_b. (V_8 − V_16) / (V_8 + V_16) is about normal
    with variance 1/n where no filter differs from another, and about ± 1/3 where they do.
    """
    total, count = 0.0, 0
    for source in sources:
        stored = source.read()
        for axis in (0, 1):
            with np.errstate(over="ignore", invalid="ignore"):
                spread = [_spread(unblocked(stored, block), axis) for block in _BLOCKS]
            if math.isfinite(sum(spread)) and sum(spread) > 0:
                total += stored.shape[axis] * (spread[0] - spread[1]) / sum(spread)
                count += stored.shape[axis]
    if abs(total) > _CLEARLY * math.sqrt(count):
        return _BLOCKS[0] if total > 0 else _BLOCKS[1]
    return _of_this_machine()


def _spread(rows: NDArray[np.float32], axis: int) -> float:
    """The variance of energies along an axis, in units of their mean."""
    energies = np.square(rows).sum((1 - axis, 2, 3), np.float64)
    return float(np.var(energies / energies.mean())) if energies.any() else 0.0


def _of_this_machine() -> int:
    node = helper.make_node("ReorderInput", ["x"], ["y"], domain=DOMAIN)
    pixel = numpy_helper.from_array(np.zeros((1, 4, 1, 1), np.float32), "x")
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    made = helper.make_graph([node], "block", [], [ValueInfoProto(name="y")], [pixel])
    return int(run_constants(helper.make_model(made, opset_imports=imports, ir_version=8))[0].shape[1])


class _Filling:
    """How many of the channels of each blocked value, fewer than a block, are there to fill it up.

    They are zero in whatever makes the value and whatever takes it; where it leaves the blocks its channels are named.
    """

    def __init__(self, graph: Graph, sources: Mapping[Any, Source], block: int) -> None:
        self._block = block
        self._same: dict[Any, Any] = {}
        self._most: dict[Any, int] = {}
        for node in graph.nodes():
            for value in _as_many(graph, node, sources.get(node)):
                self._same[self._root(value)] = self._root(node.outputs[0])
        zeros: dict[Any, tuple[int, int]] = {}
        for node, source in sources.items():
            if source.root not in zeros:
                rows = unblocked(source.read(), block)
                zeros[source.root] = _last_zeros(rows), _last_zeros(rows.swapaxes(0, 1))
            filters, channels = zeros[source.root]
            if attribute(node, "group", 1) > 1 and source.shape[1] > 1:  # which are blocked only where they fill blocks
                filters = channels = 0
            bias = floats(graph, input_of(node, 2))
            self._narrow(node.outputs[0], filters if bias is None else min(filters, _last_zeros(bias)))
            if source.shape[1] % block == 0:
                self._narrow(node.inputs[0], channels)
        for node in graph.nodes():
            if (node.domain, node.op_type) == (DOMAIN, "ReorderOutput"):
                self._narrow(node.inputs[0], -attribute(node, "channels", 0) % block)

    def of(self, value: Any) -> int:
        return self._most.get(self._root(value), 0)

    def _narrow(self, value: Any, most: int) -> None:
        root = self._root(value)
        self._most[root] = min(most, self._most.get(root, self._block - 1))

    def _root(self, value: Any) -> Any:
        while (above := self._same.get(value, value)) is not value:
            self._same[value] = value = self._same.get(above, above)
        return value


def _as_many(graph: Graph, node: Any, source: Source | None) -> list[Any]:
    """What has as many channels, in what goes into a node, as has what it gives."""
    if (node.domain, node.op_type) == (DOMAIN, "Conv"):
        alone = source is not None and attribute(node, "group", 1) > 1 and source.shape[1] == 1
        found = [input_of(node, 0) if alone else None, input_of(node, 3)]  # the latter is added to what it computes
    else:
        found = [] if node.op_type in ("Concat", "ReorderInput", "ReorderOutput") else list(node.inputs)
    return [value for value in found if value is not None and not graph.is_constant(value)] if node.outputs else []


def _last_zeros(rows: NDArray[Any]) -> int:
    """How many of the last rows hold nothing but zeros."""
    nonzero = np.flatnonzero(rows.reshape(len(rows), -1).any(axis=1))
    return len(rows) - 1 - int(nonzero[-1]) if len(nonzero) else len(rows)
