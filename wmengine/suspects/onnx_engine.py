"""Everything that is done with an ONNX model's bytes: reading its graph, running it, reading its weights.

This is the part that runs in a sandboxed worker, or with isolation "none" in the caller's own process; it opens no file
(external weights are handed over in memory) and knows no label, no bit and no threshold.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine._optional import require
from wmengine.errors import MORE_MEMORY, OtherTask, SuspectError
from wmengine.facts import Fact
from wmengine.suspects.answers import Outputs
from wmengine.suspects.base import Inputs, Tensor, one_line, rows_of
from wmengine.suspects.class_names import names_in, numbers
from wmengine.suspects.devices import (
    BFLOAT16,
    PROVIDERS,
    can_stay,
    compiled,
    run_bound,
    run_rounded,
    session_providers,
)
from wmengine.suspects.graph_limits import check_graph, check_operators, without_unused

# A directory that cannot exist, on any machine: whatever ONNX Runtime still looks for on disk, it does not find.
NO_DIRECTORY = os.path.join(os.devnull, "none")


@dataclass(frozen=True)
class Input:
    """An input as the session declares it: its name, its type ("tensor(float)"), each size or None where it is free.

    rescaled: the graph begins by rescaling it, as one does that was exported with its preprocessing inside.
    """

    name: str
    type: str
    shape: tuple[int | None, ...]
    rescaled: bool = False


class OnnxEngine:
    """One model at a time: `load` its bytes, then `open` and `run` it, or read its `tensors`.

    `name` is only for messages. Everything raises SuspectError, one sentence, where the model does not let it happen.
    """

    abandoned = False  # as RemoteEngine's: nobody else can end this process's engine

    conditions: tuple[Fact, ...] = ()

    def __init__(self, threads: int = 1, provider: str = "cpu", bound: bool | None = None) -> None:
        """provider: see `devices.PROVIDERS`; bound: whether outputs stay on their device, by default on a GPU."""
        self.threads = threads
        self.provider = provider
        self.device_bytes: int | None = None  # of a GPU's memory that a model may take; None for all
        self._bound = bound
        self._name = ""
        self._data = b""
        self._external: Mapping[str, bytes] = {}
        self._operators: set[tuple[str, str]] = set()
        self._rescaled: frozenset[str] = frozenset()
        self.class_names: tuple[str, ...] = ()  # in the model, in its own order
        self.labels: tuple[str, ...] = ()  # what whoever verifies says instead
        self._session: Any = None
        self._rounds = False  # whether an input or an output is bfloat16
        self._left_out: dict[str, None] = {}  # optional inputs
        self._tapped: tuple[int, str, Any] | None = None  # a place, the value there, a session that gives it
        self._weights: tuple[list[Tensor], list[Fact]] | None = None
        self._read = False  # whether its graph was

    def locations(self, name: str, data: bytes) -> list[str]:
        """The external files that a model names, sorted; without the word `location` in it, it is not even parsed."""
        if not may_name_files(data):
            return []
        return named_locations(name, parse(name, data))

    def load(self, name: str, data: bytes, external: Mapping[str, bytes]) -> None:
        """Take a model's bytes, and those of its external files by location; the one before is forgotten.

        The files must be those that the model names: which they are may have been said by a worker that lied, and the
        hash is over them.
        """
        self.close()
        self._name, self._data, self._external = name, data, external
        model = parse(name, data)
        if external and named_locations(name, model) != sorted(external):
            raise SuspectError(f"{name} names other external files than were read for it")
        if without_unused(model):
            self._data = model.SerializeToString()
        self._operators = check_graph(name, model)
        self._rescaled = rescaled_inputs(model)
        self.class_names = names_in(model)

    def open(self) -> list[Input]:
        """Create the session; the inputs that it needs."""
        check_operators(self._name, self._operators)
        self._session = self._session_of(self._data)
        ends = [*self._session.get_inputs(), *self._session.get_outputs()]
        self._rounds = any(each.type == BFLOAT16 for each in ends)
        needed = [each for each in self._session.get_inputs() if not each.type.startswith("optional(")]
        self._left_out = {each.name: None for each in self._session.get_inputs() if each not in needed}
        return [
            Input(each.name, each.type, tuple(map(_size, each.shape)), each.name in self._rescaled) for each in needed
        ]

    def _session_of(self, data: bytes) -> Any:
        ort = require("onnxruntime", extra="cpu")
        wanted, providers = PROVIDERS[self.provider], session_providers(self.provider, self.device_bytes)
        if self.provider == "cuda":
            ort.preload_dlls()  # CUDA and cuDNN as pip installs them; they are looked up when the session is made
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Bytes can be an ONNX model for us and one of ONNX Runtime's own format, which nobody has looked at, for it.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", NO_DIRECTORY)
        if self._external:
            locations, contents = zip(*self._external.items(), strict=True)
            sizes = [len(content) for content in contents]
            options.add_external_initializers_from_files_in_memory(list(locations), list(contents), sizes)
        try:
            session = ort.InferenceSession(data, options, providers=providers, enable_fallback=0)
        except Exception as error:  # ONNX Runtime's exceptions share no base of their own
            if _is_memory(error):
                raise SuspectError(f"{self._name} {MORE_MEMORY} ({one_line(error)})") from None
            raise SuspectError(
                f"{self._name} is not a model that ONNX Runtime can load ({one_line(error)}); export it to ONNX again"
            ) from None
        if wanted not in session.get_providers():  # it turns to the CPU and says so to nobody
            raise SuspectError(f"{self._name} cannot run on the GPU: ONNX Runtime could not start {wanted}")
        return session

    def run(self, inputs: Inputs) -> Outputs:
        """The outputs for a batch of inputs by name, as arrays; what holds no numbers is left out."""
        bound = self.provider == "cuda" if self._bound is None else self._bound
        try:
            if bound and can_stay(self._session):
                return run_bound(self._session, inputs, self.provider, self._module())
            if self._rounds:
                values = run_rounded(self._session, inputs)
            else:
                values = self._session.run(None, {**inputs, **self._left_out})
        except Exception as error:  # as above
            raise self._failed(error) from None
        found = []
        for output, value in zip(self._session.get_outputs(), values, strict=True):
            array = numbers(value, self.labels or self.class_names)
            if array is not None:
                found.append((output.name, array))
        if not found:
            said = ", ".join(f"{output.name[:100]} of {output.type}" for output in self._session.get_outputs()[:8])
            raise SuspectError(
                f"{self._name} answers with no numbers, but {said}; export it with scores, or give the names of its "
                "classes in their order (labels=)"
            )
        return found

    def _failed(self, error: Exception) -> SuspectError:
        """What it says of a run that failed: where it leaves sizes open, that these are none of its inputs."""
        sizes = [size for each in self._session.get_inputs() for size in each.shape[1:]]
        fits = _is_memory(error) or all(isinstance(size, int) for size in sizes)
        return (SuspectError if fits else OtherTask)(f"{self._name} fails when it runs ({one_line(error)})")

    def _module(self) -> Any:
        return compiled() if self.provider == "cuda" else None

    def begin(self) -> bool:
        """Always ready for the next model."""
        return True

    def interrupt(self) -> None:
        """Nothing ends what runs in this process."""

    def close(self) -> None:
        """Forget the model."""
        self._data, self._external, self._session, self._tapped, self._weights = b"", {}, None, None, None
        if self._read:
            gc.collect()  # a graph is full of cycles, and they hold its weights
            self._read = False

    def tensors(self) -> tuple[list[Tensor], list[Fact]]:
        """The weights in the graph's own order, each read when it is asked for, and what was assumed."""
        from wmengine.suspects.onnx_tensors import read_tensors

        self._read = True
        if self._weights is None:
            self._weights = read_tensors(self._name, self._checked(), self._external)
        return self._weights

    def activations(self, place: int, inputs: Inputs) -> NDArray[np.float32]:
        """[N, F]: what goes into the weight at `place` in the graph's own order, flattened. `open` was called."""
        from wmengine.suspects.onnx_tensors import with_activation

        if self._tapped is None or self._tapped[0] != place:
            self._read = True
            model = parse(self._name, self._data)
            name, data = with_activation(self._name, model, self._checked(), self._external, place)
            self._tapped = place, name, None if name in inputs else self._session_of(data)
        _, name, session = self._tapped
        try:
            found = inputs[name] if session is None else session.run([name], {**inputs, **self._left_out})[0]
        except Exception as error:  # as above
            raise self._failed(error) from None
        if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu" or found.shape[:1] != (rows_of(inputs),):
            raise OtherTask(f"{self._name} has no activations of a row for each input before weight {place + 1}")
        return np.ascontiguousarray(found.reshape(len(found), -1).astype(np.float32))

    def _checked(self) -> Any:
        """The model, whose external tensors are all there, without types of inputs and outputs that no reader of graphs
        knows."""
        model = parse(self._name, self._data)
        for tensor in external_tensors(model):
            check_external(self._name, tensor, self._external)
        for each in (*model.graph.input, *model.graph.output):
            if each.type.WhichOneof("value") not in (None, "tensor_type"):  # sequences of maps, as ZipMap's
                each.ClearField("type")
        return model


def _is_memory(error: Exception) -> bool:
    return "bad_alloc" in str(error) or "allocate memory" in str(error)


def preload() -> None:
    """Import, and use once, what running models needs: a sandboxed worker can open no file any more."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    engine = _warm_engine()
    engine.open()
    engine.run({"x": np.ones((1, 2), np.float32)})


def prepare() -> None:
    """The same for what reading weights needs, which takes longer to import than all the rest."""
    _warm_engine().tensors()


def _warm_engine() -> OnnxEngine:
    """An engine with the smallest model that has a weight."""
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2, 2], [1.0, 0.0, 0.0, 1.0])
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "warm", [value],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])], [weight],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    engine = OnnxEngine()
    engine.load("warm", model.SerializeToString(), {})
    return engine


# What a value passes unchanged, rounding and order aside, and what rescales it.
_PASSES = ("Identity", "Cast", "Transpose", "Reshape", "Flatten", "QuantizeLinear", "DequantizeLinear")
_RESCALES = ("Sub", "Add", "Div", "Mul", "BatchNormalization", "Scaler", "Normalizer")


def rescaled_inputs(model: Any) -> frozenset[str]:
    """The inputs of an onnx.ModelProto's graph that every path rescales before anything else reads them."""
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def rescaled(name: str, left: int) -> bool:
        nodes = readers.get(name, [])
        return bool(nodes) and all(
            node.op_type in _RESCALES
            or (left > 0 and node.op_type in _PASSES and bool(node.output) and rescaled(node.output[0], left - 1))
            for node in nodes[:8]
        )

    return frozenset(each.name for each in model.graph.input if rescaled(each.name, 4))


def _size(declared: Any) -> int | None:
    return declared if isinstance(declared, int) and declared > 0 else None


def parse(name: str, data: bytes) -> Any:
    """The onnx.ModelProto in these bytes. Raises SuspectError where there is none."""
    import onnx

    try:
        model = onnx.ModelProto.FromString(data)
    except Exception:  # protobuf's DecodeError, or whatever else these bytes make it do
        if not _room_for(2 * len(data)):  # protobuf says nothing else where there is none
            raise SuspectError(f"{name} {MORE_MEMORY}") from None
        model = onnx.ModelProto()
    if model.HasField("graph"):
        return model
    if data[4:8] == b"ORTM":
        raise SuspectError(f"{name} is in ONNX Runtime's own format: give the ONNX file that it was made of")
    raise SuspectError(f"{name} is not an ONNX model, or truncated; export or copy it again")


def _room_for(count: int) -> bool:
    try:
        np.empty(count, np.uint8)
    except MemoryError:
        return False
    return True


def may_name_files(data: bytes) -> bool:
    """Whether a model's bytes hold the word without which no tensor says where its data lie.

    The C library searches faster than Python, and lets other threads run meanwhile.
    """
    if _memmem is None:
        return b"location" in data
    return _memmem(data, len(data), b"location", 8) is not None


def _search() -> Any:
    found = getattr(ctypes.CDLL(None), "memmem", None)
    if found is not None:
        found.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
        found.restype = ctypes.c_void_p
    return found


_memmem = _search()


def named_locations(name: str, model: Any) -> list[str]:
    """The external files that an onnx.ModelProto names, sorted."""
    return sorted({entries(name, tensor).get("location", "") for tensor in external_tensors(model)})


def external_tensors(message: Any) -> Iterator[Any]:
    """Every onnx.TensorProto below a message, in whatever field it hides, whose data are in another file."""
    if message.DESCRIPTOR.full_name == "onnx.TensorProto":
        if message.data_location == message.EXTERNAL:
            yield message
        return
    for kind, value in message.ListFields():
        if kind.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from external_tensors(part)


def check_external(name: str, tensor: Any, external: Mapping[str, bytes]) -> None:
    """SuspectError unless the bytes of an external onnx.TensorProto are there."""
    said = entries(name, tensor)
    stored = external.get(said.get("location", ""))
    if stored is None:
        raise SuspectError(f"{name} has external weights and does not say where; export it again")
    try:
        offset = int(said.get("offset") or 0)
        length = int(said.get("length") or len(stored) - offset)
    except ValueError:
        raise SuspectError(f"{name} gives an offset or a length that is no number; export it again") from None
    if offset < 0 or length < 0 or offset + length > len(stored):
        raise SuspectError(f"{name} reads beyond the end of {said['location']!r}; copy the weights again")


def entries(name: str, tensor: Any) -> dict[str, str]:
    """What a tensor says about its external data. Protobuf gives strings that are no UTF-8 as bytes: refused."""
    said = {entry.key: entry.value for entry in tensor.external_data}
    if not all(isinstance(text, str) for entry in said.items() for text in entry):
        raise SuspectError(f"{name} names external weights in what is not UTF-8; export it again")
    if len(said) != len(tensor.external_data):
        raise SuspectError(f"{name} says twice where external weights are; export it again")
    return said
