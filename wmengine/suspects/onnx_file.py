"""An ONNX file as a suspect: its bytes are read once and hashed, ONNX Runtime answers from those bytes alone.

External weights are read by us and handed over in memory, and only from regular files with a single link inside the
model's own directory: a model must not be able to name a file that its sender could not read. ONNX Runtime itself opens
nothing: left to itself, it would resolve the weights of a model given as bytes against the working directory.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine._optional import require
from wmengine.carriers import Tensor
from wmengine.errors import SuspectError
from wmengine.suspects.base import Outputs, ask_in_chunks, check_input_shape, one_line

MAXIMUM_BYTES = 4 << 30
MAXIMUM_BATCH = 4096
INPUT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}

# A directory that cannot exist, on any machine: whatever ONNX Runtime still looks for on disk, it does not find.
NO_DIRECTORY = os.path.join(os.devnull, "none")


@dataclass(frozen=True)
class ModelFile:
    """What was read: the model's bytes, every external file it names (location → bytes), and the hash over all of it.

    sha256 covers the model's bytes, then for each location in order: NUL, location, NUL, length in digits, NUL, bytes.
    Without external files it is the file's own SHA-256. With them no single file can have the same bytes and be a
    model, as NUL begins no protobuf field.
    """

    name: str
    data: bytes = field(repr=False)
    external: dict[str, bytes] = field(repr=False)
    sha256: str


def read_model(path: str | os.PathLike[str], maximum_bytes: int = MAXIMUM_BYTES) -> ModelFile:
    """Read a model and its external weights, each once.

    Raises FileNotFoundError for a path that does not exist, SuspectError for anything else that is not an ONNX file, or
    is larger than maximum_bytes together with its weights, or names weights where they may not be.
    """
    name = os.fspath(path)
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK)  # O_NONBLOCK: a pipe must not hold us up
    except FileNotFoundError:
        raise FileNotFoundError(f"{name} does not exist; give the path of an ONNX file") from None
    except OSError as error:
        raise SuspectError(f"{name} cannot be read ({error.strerror}); check the path and its permissions") from None
    data = _read(descriptor, name, maximum_bytes, links_allowed=True)
    if not data:
        raise SuspectError(f"{name} is empty; copy the file again")
    locations = external_locations(name, data)
    external: dict[str, bytes] = {}
    left = maximum_bytes - len(data)
    for location in locations:
        external[location] = _read_external(name, location, left)
        left -= len(external[location])
    digest = hashlib.sha256(data)
    for location in locations:
        digest.update(b"\0%s\0%d\0" % (location.encode(), len(external[location])))
        digest.update(external[location])
    return ModelFile(name, data, external, digest.hexdigest())


def _read(descriptor: int, name: str, maximum_bytes: int, links_allowed: bool) -> bytes:
    status = os.fstat(descriptor)
    regular, single = stat.S_ISREG(status.st_mode), status.st_nlink == 1
    if not regular or not (single or links_allowed):
        os.close(descriptor)
        if regular:
            raise SuspectError(f"{name} is also linked from elsewhere; copy the weights beside the model")
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise SuspectError(f"{name} is {kind}; give an ONNX file, its weights beside it")
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(maximum_bytes + 1)
    if len(data) > maximum_bytes:
        raise SuspectError(f"{name} is larger than the {maximum_bytes} bytes that a model and its weights may have")
    return data


def _read_external(model: str, location: str, maximum_bytes: int) -> bytes:
    """One external file, opened part by part below the model's directory, no part of it through a symbolic link."""
    directory = os.path.dirname(model) or "."
    path = os.path.join(directory, repr(location)[1:-1])  # for messages: a name may hold line breaks
    parts = PurePosixPath(location).parts
    if not parts or os.path.isabs(location) or ".." in parts or "\0" in location:
        raise SuspectError(f"{model} names the external file {location!r}, which is not inside the model's directory")
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise SuspectError(f"{directory} cannot be opened for the weights of {model} ({error.strerror})") from None
    try:
        for depth, part in enumerate(parts, start=1):
            flags = os.O_RDONLY | os.O_NOFOLLOW | (os.O_NONBLOCK if depth == len(parts) else os.O_DIRECTORY)
            above, descriptor = descriptor, os.open(part, flags, dir_fd=descriptor)
            os.close(above)
    except FileNotFoundError:
        os.close(descriptor)
        raise SuspectError(f"{path} holds weights of {model} and is missing; copy it beside the model") from None
    except (OSError, ValueError):
        os.close(descriptor)
        raise SuspectError(f"{path} must be a regular file and no link; copy the weights beside {model}") from None
    return _read(descriptor, path, maximum_bytes, links_allowed=False)


def external_locations(name: str, data: bytes) -> list[str]:
    """The external files that a model names, sorted; without the word `location` it names none and is not parsed."""
    if b"location" not in data:
        return []
    return sorted({_entries(name, tensor).get("location", "") for tensor in external_tensors(parse(name, data))})


def parse(name: str, data: bytes) -> Any:
    """The onnx.ModelProto in these bytes. Raises SuspectError where there is none."""
    import onnx

    try:
        model = onnx.ModelProto.FromString(data)
    except Exception:  # protobuf's DecodeError, or whatever else these bytes make it do
        raise SuspectError(f"{name} is not an ONNX model, or truncated; export or copy it again") from None
    if not model.HasField("graph"):
        raise SuspectError(f"{name} is not an ONNX model: it has no graph; export or copy it again")
    return model


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


def parse_in_memory(file: ModelFile) -> Any:
    """The onnx.ModelProto with external tensors replaced by their bytes, so that reading it opens no file."""
    model = parse(file.name, file.data)
    for tensor in external_tensors(model):
        entries = _entries(file.name, tensor)
        stored = file.external.get(entries.get("location", ""))
        if stored is None:
            raise SuspectError(f"{file.name} has external weights and does not say where; export it again")
        try:
            offset = int(entries.get("offset") or 0)
            length = int(entries.get("length") or len(stored) - offset)
        except ValueError:
            raise SuspectError(f"{file.name} gives an offset or a length that is no number; export it again") from None
        if offset < 0 or length < 0 or offset + length > len(stored):
            raise SuspectError(f"{file.name} reads beyond the end of {entries['location']!r}; copy the weights again")
        tensor.raw_data = stored[offset : offset + length]
        tensor.data_location = tensor.DEFAULT
        del tensor.external_data[:]
    return model


def _entries(name: str, tensor: Any) -> dict[str, str]:
    """What a tensor says about its external data. Protobuf gives strings that are no UTF-8 as bytes: refused."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if not all(isinstance(text, str) for entry in entries.items() for text in entry):
        raise SuspectError(f"{name} names external weights in what is not UTF-8; export it again")
    return entries


class OnnxSuspect:
    """An ONNX file: answers through ONNX Runtime on the CPU, shows its weights without it.

    Raises as `read_model`. The session runs on one thread, or on as many as `wmengine.set_num_threads` was given.
    """

    def __init__(self, path: str | os.PathLike[str], maximum_bytes: int = MAXIMUM_BYTES) -> None:
        self.file = read_model(path, maximum_bytes)
        self.name = self.file.name
        self.sha256: str | None = self.file.sha256
        self.notes: list[str] = []
        self._session: Any = None

    def query(self, inputs: NDArray[np.float32], num_classes: int | None = None) -> NDArray[Any]:
        self.notes = []
        session = self._open_session()
        required = session.get_inputs()
        if len(required) != 1:
            names = ", ".join(entry.name for entry in required) or "none"
            raise SuspectError(f"{self.name} needs {len(required)} inputs ({names}), and a trigger is one")
        (entry,) = required
        dtype = INPUT_TYPES.get(entry.type)
        if dtype is None:
            raise SuspectError(f"{self.name} takes {entry.type}, and triggers can be {', '.join(INPUT_TYPES)}")
        batch, *rest = [size if isinstance(size, int) and size > 0 else None for size in entry.shape] or [None]
        if entry.shape:  # an input without any declared shape takes everything
            check_input_shape(self.name, [batch, *rest], inputs)
        if dtype is not np.float32:
            self.notes.append(f"inputs were cast to {np.dtype(dtype).name}")
        if batch is not None and batch > MAXIMUM_BATCH:
            raise SuspectError(
                f"{self.name} has a fixed batch of {batch}, and at most {MAXIMUM_BATCH} can be asked at once"
            )
        if batch is not None:
            self.notes.append(f"the suspect has a fixed batch of {batch}")
        outputs = [output.name for output in session.get_outputs()]

        def run(rows: NDArray[np.float32]) -> Outputs:
            try:
                return list(zip(outputs, session.run(None, {entry.name: rows.astype(dtype)}), strict=True))
            except Exception as error:  # ONNX Runtime's exceptions share no base of their own
                raise SuspectError(f"{self.name} fails when it runs ({one_line(error)})") from None

        return ask_in_chunks(run, inputs, num_classes, self.name, self.notes, batch)

    def tensors(self, input_shape: Sequence[int] | None = None) -> list[Tensor]:
        """The weights in the graph's own order; input_shape is not needed."""
        from wmengine.suspects.onnx_tensors import read_tensors

        tensors, self.notes = read_tensors(self.name, parse_in_memory(self.file))
        return tensors

    def _open_session(self) -> Any:
        if self._session is not None:
            return self._session
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported: a queue and a thread less
        ort = require("onnxruntime", extra="cpu")
        from wmengine.ops import get_num_threads

        options = ort.SessionOptions()
        options.intra_op_num_threads = get_num_threads()
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", NO_DIRECTORY)
        if self.file.external:
            locations, contents = zip(*self.file.external.items(), strict=True)
            sizes = [len(content) for content in contents]
            options.add_external_initializers_from_files_in_memory(list(locations), list(contents), sizes)
        try:
            session = ort.InferenceSession(
                self.file.data, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:  # as above
            raise SuspectError(
                f"{self.name} is not a model that ONNX Runtime can load ({one_line(error)}); export it to ONNX again"
            ) from None
        self._session = session
        return session
