"""Precision: float16 and int8, by the tools that everybody uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine._optional import require
from wmengine.attacks.data import Data
from wmengine.attacks.files import floating, read_onnx, read_safetensors, write_onnx, write_safetensors

KINDS = ("qdq", "qoperator", "dynamic")
BATCH = 16


def fp16(source: Path, target: Path, data: Data | None) -> None:
    """An ONNX file by ONNX Runtime's float16 tool; the floating tensors of a safetensors file by a cast."""
    if source.suffix == ".safetensors":
        tensors, metadata = read_safetensors(source)
        with np.errstate(over="ignore"):
            halves = {name: array.astype(np.float16) for name, array in tensors.items() if floating(array)}
        return write_safetensors(target, tensors | halves, metadata)
    float16 = require("onnxruntime.transformers.float16", extra="cpu")
    return write_onnx(float16.convert_float_to_float16(read_onnx(source)), target)


def int8(source: Path, target: Path, data: Data | None, kind: str, calibration: int) -> None:
    """An ONNX file by ONNX Runtime's quantizer: static, in either of its formats and calibrated on the first
    `calibration` inputs, or dynamic, for which there need be none."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, and it is {kind!r}")
    quantization = require("onnxruntime.quantization", extra="cpu")
    preparation = require("onnxruntime.quantization.shape_inference", extra="cpu")
    model = read_onnx(source)
    batches = iter(() if kind == "dynamic" else _batches(source, model.graph, data, calibration))
    preparation.quant_pre_process(source, target, skip_symbolic_shape=True)
    if kind == "dynamic":
        model = read_onnx(target)
        del model.graph.value_info[:]  # noted shapes of weights, over which the tool trips when it turns them round
        quantization.quantize_dynamic(model, target)
        return
    base: Any = quantization.CalibrationDataReader

    class Calibration(base):  # type: ignore[misc]
        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return next(batches, None)

    form = quantization.QuantFormat.QDQ if kind == "qdq" else quantization.QuantFormat.QOperator
    quantization.quantize_static(target, target, Calibration(), quant_format=form, per_channel=True)


def _batches(source: Path, graph: Any, data: Any, count: int) -> list[dict[str, NDArray[Any]]]:
    """The first inputs under the file's own names, in batches of its fixed size or of 16."""
    from onnx import helper

    if not isinstance(count, int) or count < 1:
        raise ValueError(f"calibration must be a number of inputs, at least 1, and it is {count!r}")
    held = {tensor.name for tensor in graph.initializer}
    entries = [entry for entry in graph.input if entry.name not in held]
    given = data.arrays(count)
    rows = given if isinstance(given, dict) else {entry.name: each for entry, each in zip(entries, given, strict=False)}
    if rows.keys() != {entry.name for entry in entries}:
        names = ", ".join(entry.name for entry in entries)
        raise ValueError(f"{source} takes the inputs {names}: give them as data, a dict of arrays by these names")
    types = {entry.name: helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type) for entry in entries}
    shape = entries[0].type.tensor_type.shape
    fixed = shape.dim[0].dim_value if len(shape.dim) else 0
    size, there = fixed or BATCH, min(map(len, rows.values()))
    starts = range(0, there - (fixed or 1) + 1, size)
    if not starts:
        raise ValueError(f"{source} takes batches of {fixed}, and data has {there} inputs")
    return [{name: rows[name][start : start + size].astype(types[name]) for name in rows} for start in starts]
