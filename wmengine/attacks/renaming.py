"""Renaming: a file in which no name, and nothing that an exporter noted about names, is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wmengine.attacks.data import Data
from wmengine.attacks.files import read_onnx, write_onnx


def rename(source: Path, target: Path, data: Data | None) -> None:
    """Give every tensor, node, input and output of an ONNX file a new name, those of subgraphs included."""
    from onnx import inliner

    model = read_onnx(source)
    if model.functions:  # which have names of their own
        model = inliner.inline_local_functions(model)
    names: dict[str, str] = {"": ""}

    def renamed(name: str) -> str:
        return names.setdefault(name, f"t{len(names)}")

    def rename_graph(graph: Any) -> None:
        sparse = [part for tensor in graph.sparse_initializer for part in (tensor.values, tensor.indices)]
        for value in (*graph.input, *graph.output, *graph.initializer, *sparse):
            value.name, value.doc_string = renamed(value.name), ""
            del value.metadata_props[:]
        for index, node in enumerate(graph.node):
            node.name = f"n{index}"
            node.doc_string = ""
            del node.metadata_props[:]
            node.input[:] = [renamed(name) for name in node.input]
            node.output[:] = [renamed(name) for name in node.output]
            for attribute in node.attribute:
                for inner in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():
                    rename_graph(inner)
        del graph.value_info[:]
        del graph.metadata_props[:]
        del graph.quantization_annotation[:]
        graph.name, graph.doc_string = "g", ""

    rename_graph(model.graph)
    model.doc_string = ""
    del model.metadata_props[:]
    write_onnx(model, target)
