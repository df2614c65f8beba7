"""Where ONNX models run: the processors that ONNX Runtime is asked for, and answers that stay on their device.

On a GPU a batch goes up once, the outputs stay there, and `wmengine._cuda` reads the class of each row where the scores
lie: four bytes a row come back, and one a score, its level. Addresses are ONNX Runtime's own, so no torch is needed.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine._optional import require
from wmengine.suspects.answers import Outputs, Predicted, shape_of_answers

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DEVICE = 0  # the first that CUDA_VISIBLE_DEVICES leaves

# Types of scores that _cuda reads, by its own numbers; all integers and doubles are copied back and read here.
BFLOAT16 = "tensor(bfloat16)"
_SCORES = {"tensor(float)": 0, "tensor(float16)": 1, BFLOAT16: 2}
_COPIED = {f"tensor({kind})" for kind in ("float", "float16", "double", "bool", "int8", "int16", "int32", "int64")}
_COPIED |= {f"tensor({kind})" for kind in ("uint8", "uint16", "uint32", "uint64")}


def check_device(device: str) -> None:
    """Raises ValueError unless models can run there: never does the CPU take a GPU's place in silence."""
    if device not in PROVIDERS:
        raise ValueError(f"device must be one of {', '.join(PROVIDERS)}, and it is {device!r}")
    if device == "cpu":
        return
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at import
    runtime = require("onnxruntime", extra="gpu")
    if PROVIDERS[device] not in runtime.get_available_providers():
        raise ValueError(
            f"device={device!r} needs ONNX Runtime with {PROVIDERS[device]}, which the one installed has not: "
            "pip uninstall onnxruntime, then pip install 'wmengine[gpu]'"
        )
    if not _driver_shows_a_device():
        raise ValueError(f"device={device!r} needs an NVIDIA GPU and its driver, and none is found")


def session_providers(provider: str, memory_bytes: int | None) -> list[Any]:
    """What to ask ONNX Runtime for. memory_bytes: of the GPU's own, that a model may take.

    On a GPU without TF32, which keeps 10 bits of a product's factors: answers are to differ from the CPU's by rounding
    only; and with the convolutions that cuDNN guesses to be quick, as a trial of all takes longer than our few batches.
    """
    name = PROVIDERS[provider]
    if provider == "cpu":
        return [name]
    options = {"device_id": str(DEVICE), "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    if memory_bytes is not None:
        options |= {"gpu_mem_limit": str(memory_bytes), "arena_extend_strategy": "kSameAsRequested"}
    return [(name, options)]


def compiled() -> ModuleType | None:
    """wmengine._cuda, or None where it was not built or does not load."""
    try:
        return importlib.import_module("wmengine._cuda")
    except ImportError:
        return None


def can_stay(session: Any) -> bool:
    """Whether every output can be bound: maps, sequences and text cannot, and are few bytes."""
    return all(output.type in _COPIED | _SCORES.keys() for output in session.get_outputs())


def run_bound(session: Any, feeds: Mapping[str, NDArray[Any]], device: str, module: ModuleType | None) -> Outputs:
    """The outputs for a batch, run with inputs and outputs on a device ("cpu" or "cuda").

    Scores [N, C] of float32, float16 or bfloat16 become `Predicted` by `module`, wmengine._cuda; without one, and of
    any other type, they are copied back. What has more axes than answers have stays where it is and is left out.
    """
    binding = session.io_binding()
    for name, value in _on_device(session, feeds, device):
        binding.bind_ortvalue_input(name, value)
    declared = session.get_outputs()
    for output in declared:
        binding.bind_output(output.name, device, DEVICE)
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    rows_asked = len(next(iter(feeds.values())))
    found: Outputs = []
    for output, value in zip(declared, binding.get_outputs(), strict=True):
        shape = shape_of_answers(tuple(value.shape()), rows_asked)
        if shape is None:
            continue
        if module is not None and len(shape) == 2 and shape[1] > 1 and value.data_type() in _SCORES:
            found.append((output.name, predict(module, value, shape, device)))
        else:
            found.append((output.name, value.numpy()))
    return found


def run_rounded(session: Any, feeds: Mapping[str, NDArray[Any]]) -> list[Any]:
    """All outputs on the CPU, as arrays, of a session with inputs or outputs of bfloat16, which NumPy has not: there
    float32 is rounded to the nearest on the way in, and comes out again."""
    values = session.run_with_ort_values(None, dict(_on_device(session, feeds, "cpu")))
    return [_array_of(value) for value in values]


def _on_device(session: Any, feeds: Mapping[str, NDArray[Any]], device: str) -> Iterator[tuple[str, Any]]:
    make = require("onnxruntime", extra="cpu").OrtValue
    rounded = {each.name for each in session.get_inputs() if each.type == BFLOAT16}
    for name, rows in feeds.items():
        if name in rounded:
            bits = np.ascontiguousarray(rows, np.float32).view(np.uint32)
            halves = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            yield name, make.ortvalue_from_numpy_with_onnx_type(halves, 16)  # TensorProto.BFLOAT16
        else:
            yield name, make.ortvalue_from_numpy(np.ascontiguousarray(rows), device, DEVICE)


def _array_of(value: Any) -> NDArray[Any]:
    if value.data_type() != BFLOAT16:
        return np.asarray(value.numpy())
    halves = np.frombuffer(ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes()), np.uint16)
    return (halves.astype(np.uint32) << 16).view(np.float32).reshape(value.shape())


def predict(module: ModuleType, scores: Any, shape: tuple[int, ...], device: str) -> Predicted:
    """The class of each row of an OrtValue of scores [N, C] and the levels of its classes, found where they lie.

    Nothing is expected here: labels stay with who judges. The stream is CUDA's default one, which the copies wait for.
    """
    make = require("onnxruntime", extra="cpu").OrtValue.ortvalue_from_shape_and_type
    rows, classes = shape
    labels, levels = make([rows], np.int32, device, DEVICE), make([rows, classes], np.int8, device, DEVICE)
    module.match_counts(
        device=DEVICE,
        stream=0,
        outputs=scores.data_ptr(),
        dtype=_SCORES[scores.data_type()],
        rows=rows,
        classes=classes,
        expected=0,
        group=0,
        groups=0,
        predicted=labels.data_ptr(),
        at=0,
        histogram=0,
        hits=0,
        invalid=0,
        levels=levels.data_ptr(),
    )
    return Predicted(labels.numpy(), classes, levels.numpy())


def _driver_shows_a_device() -> bool:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
