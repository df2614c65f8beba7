"""What hostile ONNX files are made with; hostile_files, hostile_graphs and hostile_runs hold every way that we know in
which a stranger's file could hurt its reader.

Their `CORPUS` maps a name to a `Hostile`: what writes the file (and what lies beside it), and what must be said of it.
All take inputs float32 [N, 1, 4, 4], as the marks of tests/test_hostile.py put them, unless that is what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
FEATURES, CLASSES = 16, 10
WEIGHT = np.random.default_rng(0).normal(size=(FEATURES, CLASSES)).astype(np.float32)
# What lies outside of a model's directory: none of these bytes may ever be seen in a result.
SECRET = b"canary-7f3a9c51-never-to-be-seen"


@dataclass(frozen=True)
class Hostile:
    """write(folder, path) makes the file; error matches what is said of a mark that asks, weights the error or the
    notes of one that reads.

    Where error is None the file merely answers badly: it is not proven, and note is among the notes.
    """

    write: Callable[[Path, Path], None]
    error: str | None = None
    note: str | None = None
    weights: str | None = None


def into(corpus: dict[str, Hostile]) -> Any:
    """A decorator, given what is to be said, that puts a function into the corpus: it returns a model or its bytes, or
    writes to `path` itself."""

    def hostile(error: str | None = None, note: str | None = None, weights: str | None = None) -> Any:
        def register(make: Callable[..., Any]) -> Any:
            def write(folder: Path, path: Path) -> None:
                made = make(folder, path) if make.__code__.co_argcount else make()
                if made is not None:
                    path.write_bytes(made if isinstance(made, bytes) else made.SerializeToString())

            corpus[make.__name__] = Hostile(write, error, note, weights)
            return make

        return register

    return hostile


def value(name: str, kind: int = FLOAT, shape: Any = None) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def constant(name: str, content: Any) -> Any:
    return numpy_helper.from_array(np.asarray(content), name)


def node(operator: str, takes: str, gives: str, **attributes: Any) -> Any:
    """Names separated by blanks; "-" is an input left out."""
    names = ["" if name == "-" else name for name in takes.split()]
    return helper.make_node(operator, names, gives.split(), **attributes)


def model(
    nodes: Any,
    initializers: Any = (),
    outputs: Any = None,
    inputs: Any = None,
    opset: int = 17,
    ir: int = 9,
    **more: Any,
) -> Any:
    """A model from x [N, 1, 4, 4] to y."""
    graph = helper.make_graph(
        nodes, "g", inputs or [value("x", shape=["N", 1, 4, 4])], outputs or [value("y")], list(initializers)
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("f", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir, **more)


def classifier(*nodes: Any, initializers: Any = (), **options: Any) -> Any:
    """A linear classifier from x to s, and the nodes behind it, to y."""
    head = [node("Flatten", "x", "f"), node("MatMul", "f w", "s")]
    if not nodes:
        nodes = (node("Identity", "s", "y"),)
    return model([*head, *nodes], [constant("w", WEIGHT), *initializers], **options)


def external(location: str, name: str = "w", shape: Any = (FEATURES, CLASSES), **entries: Any) -> Any:
    tensor = TensorProto(name=name, data_type=FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, text in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(text))
    return tensor


def with_external(location: str, **options: Any) -> Any:
    return model([node("Flatten", "x", "f"), node("MatMul", "f w", "y")], [external(location, **options)])


def subgraph(nodes: Any, outputs: Any, inputs: Any = (), initializers: Any = ()) -> Any:
    return helper.make_graph(list(nodes), "inner", list(inputs), list(outputs), list(initializers))
