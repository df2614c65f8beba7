"""Precision: float16 and int8, by the tools that everybody uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine._optional import require
from wmengine.attacks.data import Data
from wmengine.attacks.files import (
    cast,
    floating,
    initializers,
    read_onnx,
    read_safetensors,
    reason,
    write_onnx,
    write_safetensors,
)
from wmengine.marking.export import quiet
from wmengine.parts.fields import integer, one_of

KINDS = ("qdq", "qoperator", "dynamic")
BATCH, MOST_ROWS = 16, 1 << 20


@contextmanager
def _tool(source: Path) -> Iterator[None]:
    """A tool of others at work: it is quiet, and what it raises is told as ValueError."""
    try:
        with quiet():
            yield
    except (ImportError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"ONNX Runtime's tool cannot change {source} ({reason(error)})") from error


def fp16(source: Path, target: Path, data: Data | None) -> None:
    """An ONNX file by ONNX Runtime's float16 tool; the floating tensors of a safetensors file by a cast."""
    if source.suffix == ".safetensors":
        tensors, metadata = read_safetensors(source)
        halves = {name: cast(name, array, array, np.float16) for name, array in tensors.items() if floating(array)}
        write_safetensors(target, tensors | halves, metadata)
        return
    float16 = require("onnxruntime.transformers.float16", extra="cpu")
    model = read_onnx(source)
    with _tool(source):
        write_onnx(float16.convert_float_to_float16(model), target)


def int8(source: Path, target: Path, data: Data | None, kind: str, calibration: int) -> None:
    """An ONNX file by ONNX Runtime's quantizer: static, in either of its formats and calibrated on the first
    `calibration` inputs, or dynamic, for which there need be none."""
    one_of("kind", kind, KINDS)
    quantization = require("onnxruntime.quantization", extra="cpu")
    preparation = require("onnxruntime.quantization.shape_inference", extra="cpu")
    model = read_onnx(source)
    batches = iter(() if kind == "dynamic" else _batches(source, model.graph, data, calibration))
    with _tool(source):
        preparation.quant_pre_process(source, target, skip_symbolic_shape=True)
    base: Any = quantization.CalibrationDataReader

    class Calibration(base):  # type: ignore[misc]
        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return next(batches, None)

    form = quantization.QuantFormat.QDQ if kind == "qdq" else quantization.QuantFormat.QOperator
    with _tool(source):
        if kind == "dynamic":
            model = read_onnx(target)
            del model.graph.value_info[:]  # noted shapes of weights, over which the tool trips when it turns them round
            quantization.quantize_dynamic(model, target)
        else:
            quantization.quantize_static(target, target, Calibration(), quant_format=form, per_channel=True)
    held = initializers(read_onnx(target)).values()
    if not any(array.ndim > 1 and array.dtype in (np.int8, np.uint8) for array in held):
        raise ValueError(f"{source} holds no weights that ONNX Runtime's tool can put into 8 bits")


def _batches(source: Path, graph: Any, data: Any, count: int) -> list[dict[str, NDArray[Any]]]:
    """The first inputs under the file's own names, in batches of its fixed size or of 16."""
    from onnx import helper

    count = integer("calibration", count, 1, MOST_ROWS)
    held = {tensor.name for tensor in graph.initializer}
    entries = [entry for entry in graph.input if entry.name not in held]
    given = data.arrays(count)
    rows = given if isinstance(given, dict) else {entry.name: each for entry, each in zip(entries, given, strict=False)}
    if rows.keys() != {entry.name for entry in entries}:
        names = ", ".join(entry.name for entry in entries)
        raise ValueError(f"{source} takes the inputs {names}: give them as data, a dict of arrays by these names")
    for entry in entries:
        sizes = [each.dim_value for each in entry.type.tensor_type.shape.dim]
        given, rank = list(rows[entry.name].shape[1:]), len(sizes)
        if rank and (len(given) != rank - 1 or any(a != b for a, b in zip(given, sizes[1:], strict=True) if b)):
            wanted = ", ".join(str(size or "?") for size in sizes[1:])
            raise ValueError(f"{source} takes {entry.name} [n, {wanted}], and a row of data is {given}")
    types = {entry.name: helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type) for entry in entries}
    shape = entries[0].type.tensor_type.shape
    fixed = shape.dim[0].dim_value if len(shape.dim) else 0
    size, there = fixed or BATCH, min(map(len, rows.values()))
    starts = range(0, there - (fixed or 1) + 1, size)
    if not starts:
        raise ValueError(f"{source} takes batches of {fixed}, and data has {there} inputs")
    return [{name: rows[name][start : start + size].astype(types[name]) for name in rows} for start in starts]
