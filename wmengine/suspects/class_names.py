"""Outputs of text: which classes they name. A file whose classes have names holds these in the order of its scores.

The order in a file costs nothing, whatever it is: it was there before the expected symbols were compared with anything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.errors import OtherTask
from wmengine.suspects.answers import ABSTAINED

MAXIMUM_NAMES = 1 << 16
INT64 = 7  # as onnx.TensorProto numbers it

# At most 18 digits, so that it fits 64 bits.
_NUMBERED = re.compile(r"(|.{0,100}[^\d.+-])([+-]?\d{1,18})", re.DOTALL | re.ASCII)


def check_labels(labels: Any) -> tuple[str, ...] | None:
    """The names of classes that whoever verifies gives, in their order. Raises ValueError for what are none."""
    if labels is None:
        return None
    if (
        not isinstance(labels, list | tuple)
        or not all(isinstance(label, str) for label in labels)
        or not 2 <= len(labels) == len(set(labels))
    ):
        raise ValueError("labels must be the names of all classes, in their order, each once")
    return tuple(labels)


def check_enough(labels: Sequence[str] | None, num_classes: int | None) -> None:
    """Raises OtherTask where names are given, and of fewer classes than a mark has."""
    if labels and len(labels) < (num_classes or 0):
        raise OtherTask(f"labels= names {len(labels)} classes and the watermark has {num_classes}; give all names")


def names_in(model: Any) -> tuple[str, ...]:
    """The names of classes in an onnx.ModelProto, in its own order; empty where it answers with none.

    They are the first list of texts on the way back from an output of texts or maps: what ZipMap, a classifier of
    ai.onnx.ml or a LabelEncoder holds, or a constant. Names that end in numbers of classes need no list.
    """
    from onnx import TensorProto

    graph = model.graph
    ways = [
        each.name
        for each in graph.output
        if each.type.WhichOneof("value") == "sequence_type" or each.type.tensor_type.elem_type == TensorProto.STRING
    ]
    if not ways:
        return ()
    makers = {name: node for node in graph.node for name in node.output}
    constants = {each.name: each for each in graph.initializer if each.data_type == TensorProto.STRING}
    seen: set[str] = set()
    for name in ways:  # which grows
        if name in seen:
            continue
        seen.add(name)
        node = makers.get(name)
        texts = _texts(constants[name]) if name in constants else [] if node is None else _listed(node)
        if 2 <= len(texts) == len(set(texts)) <= MAXIMUM_NAMES:
            found = numbered(texts)
            return () if found is not None and min(found) <= len(found) else tuple(texts)
        ways += [] if node is None else node.input
    return ()


def _listed(node: Any) -> list[str]:
    """The texts that a node holds: as its classes, as what it encodes numbers with, or as a constant."""
    from onnx import helper

    held = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    values = held.get("values_strings") or _texts(held.get("values_tensor"))
    if node.op_type == "LabelEncoder":
        keys = held.get("keys_int64s") or held.get("keys_floats") or _whole(held.get("keys_tensor"))
        return _decoded([values[place] for place in np.argsort(keys)]) if len(keys) == len(values) else []
    for name in ("classlabels_strings", "value_strings", "value"):
        texts = held.get(name)
        if texts:
            return _decoded(texts) if isinstance(texts, list) else _texts(texts)
    return []


def _texts(tensor: Any) -> list[str]:
    """Of an onnx.TensorProto of texts, or anything else."""
    return _decoded(getattr(tensor, "string_data", ()))


def _whole(tensor: Any) -> list[int]:
    """Of an onnx.TensorProto of int64 that holds its values itself."""
    raw = getattr(tensor, "raw_data", b"")
    if getattr(tensor, "data_type", None) != INT64 or len(raw) % 8:
        return []
    return list(tensor.int64_data) or np.frombuffer(raw, "<i8").tolist()


def _decoded(texts: Any) -> list[str]:
    return [text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text) for text in texts]


def numbers(value: Any, names: Sequence[str] = ()) -> NDArray[Any] | None:
    """An output as an array of numbers, or None.

    Text becomes its place in `names`, or ABSTAINED; without names, text that reads as integers, or ends in them behind
    the same word ("class_7"), becomes integers. A sequence of maps, scikit-learn's ZipMap, becomes [N, C], its columns
    in the order of `names` or of such numbers, or else as the model lists them.
    """
    if isinstance(value, list):
        return _zip_map(value, names)
    array = np.asarray(value)
    if array.dtype.kind in "OUS":
        texts = [text if isinstance(text, str) else str(text) for text in array.reshape(-1).tolist()]
        if names:
            place = {name: number for number, name in enumerate(names)}
            found: list[int] | None = [place.get(text, ABSTAINED) for text in texts]
        else:
            found = numbered(texts)
        if found is None:
            return None
        array = np.array(found, dtype=np.int64).reshape(array.shape)
    return array if array.dtype.kind in "fiub" else None


def _zip_map(rows: list[Any], names: Sequence[str]) -> NDArray[np.float32] | None:
    if not rows or not all(isinstance(row, dict) and row.keys() == rows[0].keys() for row in rows):
        return None
    columns = list(rows[0])
    keys = numbered(columns)
    if set(names) == set(columns):
        columns = list(names)
    elif keys is not None:
        columns = [column for _, column in sorted(zip(keys, columns, strict=True), key=lambda pair: pair[0])]
    try:
        return np.array([[row[column] for column in columns] for row in rows], dtype=np.float32)
    except (TypeError, ValueError):
        return None


def numbered(names: Sequence[Any]) -> list[int] | None:
    """The numbers in names of classes: 7, "7", or "class_7" among others that begin so; None where one has none."""
    found = [_NUMBERED.fullmatch(name if isinstance(name, str) else str(name)) for name in names]
    words = {match and match[1] for match in found}
    if len(words) > 1 or None in words:
        return None
    return [int(match[2]) for match in found if match is not None]
