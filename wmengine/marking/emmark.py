"""Mark a quantised ONNX file without training: a few of its integers are moved one step up or down."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from wmengine.identity.key import Key
from wmengine.marks.catalogue import scheme
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Integers, Task
from wmengine.parts.sources.integers import places_of
from wmengine.suspects.base import InputSpec, Tensor
from wmengine.suspects.onnx_tensors import read_tensors

_MATRICES = ("Gemm", "MatMul")
_DOMAINS = ("", "ai.onnx")
# The lowest and the highest integer that is not at an end of the range; symmetric quantisers leave out the lowest.
_FREE = {"INT8": (-126, 126), "UINT8": (1, 254), "INT4": (-6, 6), "UINT4": (1, 14)}


def emmark(
    model: str | os.PathLike[str],
    key: Key | str | os.PathLike[str],
    *,
    name: str,
    out: str | os.PathLike[str],
    bits: int = 256,
    message: str | None = None,
) -> Watermark:
    """Write a marked copy of a quantised ONNX file to `out`; returns its watermark, to be saved and registered.

    model: your own file, in which DequantizeLinear makes the weights of convolutions and matrices from int8, uint8,
    int4 or uint4, as ONNX Runtime's static quantizer writes it ("QDQ"). It is the reference: keep it to yourself, as
    whoever compares the two sees the places. key: the owner's Key, or its file. name: the model's; message: whom this
    copy is for. Raises ValueError for what is no ONNX file, for one without such weights, or with too few, and where
    `out` exists.
    """
    if os.path.lexists(out):
        raise ValueError(f"{os.fspath(out)} exists already: give another path for the marked file")
    key = key if isinstance(key, Key) else Key.load(key)
    if os.path.exists(model) and not os.path.isfile(model):
        raise ValueError(f"{os.fspath(model)} is not a file: give a quantised ONNX file")
    try:
        proto = onnx.load(os.fspath(model))
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise ValueError(f"{os.fspath(model)} cannot be read as an ONNX file ({error})") from None
    preset = scheme("emmark", bits=bits)
    integers = integers_of(proto)
    if not integers:
        raise ValueError(f"{os.fspath(model)} holds no weights that are integers: quantise it first, as QDQ")
    parameters = preset.describe(Task(_inputs(proto), integers=integers), name)
    mark = Watermark.create(key, preset, parameters, message=message)
    move(proto, mark)
    onnx.save(proto, Path(out))
    return mark


def integers_of(proto: Any) -> list[Integers]:
    """The weights of an onnx.ModelProto that are stored as integers, in order of execution.

    What a step is worth is found by moving all integers that can be moved, and reading again: however scales lie.
    """
    stored, free = _stored(proto), {}
    moved = type(proto)()
    moved.CopyFrom(proto)
    for weight, turned in stored.items():
        held = _initializer(moved, weight)
        whole = _numbers(held)
        least, most = _FREE[_kind(held)]
        inside = (whole >= least) & (whole <= most)
        _write(held, whole + inside)
        free[weight] = np.ascontiguousarray(inside.T if turned else inside)
    found = []
    for place, (tensor, again) in enumerate(zip(_tensors(proto), _tensors(moved), strict=True)):
        movable = free.get(tensor.source)
        if movable is None or tensor.values.shape != movable.shape:
            continue
        steps = again.values - tensor.values
        if np.array_equal(steps > 0, movable):  # else it is read in another layout than it is written in
            found.append(Integers(place, tensor.values, np.where(movable, steps, np.float32(1.0)), movable))
    return found


def move(proto: Any, mark: Watermark) -> None:
    """Move the integers at the mark's places, up for a 1 and down for a 0, in an onnx.ModelProto."""
    tensors, stored, (carrier, inside) = _tensors(proto), _stored(proto), places_of(mark)
    for number, place in enumerate(mark.parameters["carrier_indices"]):
        here = carrier == number
        held = _initializer(proto, tensors[place].source)
        whole = _numbers(held)
        oriented = whole.T if stored[held.name] else whole  # a view
        oriented[np.unravel_index(inside[here], oriented.shape)] += 2 * mark.symbols[here].astype(np.int64) - 1
        _write(held, whole)


def _tensors(proto: Any) -> list[Tensor]:
    return read_tensors("the model", proto)[0]


def _stored(proto: Any) -> dict[str, bool]:
    """The names of integer initializers that are weights, and whether they are stored filters last."""
    graph = proto.graph
    kinds = {held.name: held for held in graph.initializer}
    made = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.domain in _DOMAINS
        if node.input[0] in kinds and _kind(kinds[node.input[0]]) in _FREE
    }
    found = {}
    for node in graph.node:
        if node.domain in _DOMAINS and node.op_type in ("Conv", *_MATRICES) and node.input[1] in made:
            turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            found[made[node.input[1]]] = node.op_type in _MATRICES and not turned
    return found


def _initializer(proto: Any, name: str) -> Any:
    return next(held for held in proto.graph.initializer if held.name == name)


def _write(held: Any, whole: NDArray[np.int64]) -> None:
    """Other integers in place of an initializer's own, of its type."""
    held.CopyFrom(numpy_helper.from_array(whole.astype(numpy_helper.to_array(held).dtype), held.name))


def _kind(held: Any) -> str:
    return str(onnx.TensorProto.DataType.Name(held.data_type))


def _numbers(held: Any) -> NDArray[np.int64]:
    return np.array(numpy_helper.to_array(held)).astype(np.int64)


def _inputs(proto: Any) -> dict[str, InputSpec]:
    """What the graph declares, without the batch; a length that it leaves open counts as 1."""
    held = {each.name for each in proto.graph.initializer}
    found = {}
    for given in proto.graph.input:
        if given.name not in held:
            kind = given.type.tensor_type
            shape = tuple(max(1, axis.dim_value) for axis in kind.shape.dim[1:])
            found[given.name] = InputSpec(shape, np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)).name)
    return found
