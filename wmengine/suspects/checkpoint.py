"""A checkpoint as a suspect: the weights of a safetensors file or of a torch state dict, which hold no graph.

Nothing of it is run: names and places are read from a safetensors file's header or from the pickle of a torch archive,
by a machine that can call nothing, and of the numbers only those of weights that a mark's carriers could be, one weight
at a time, however large the file is. No graph tells the order of execution: both the order of the file and that of the
names, numbers in them by their size, are tried and paid for.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from wmengine.errors import SuspectError, printable
from wmengine.facts import Fact, fact
from wmengine.suspects.adapters import Adapter, Range
from wmengine.suspects.base import Answers, Inputs, Signature, Tensor, Weight, one_line
from wmengine.suspects.checkpoint_weights import Array, Entry, weights_of
from wmengine.suspects.torch_pickle import StoredTensor, tensors_of

MAXIMUM_HEADER = 100_000_000  # the safetensors library's own
MAXIMUM_PICKLE = 64 << 20
_BLOCK = 1 << 22
_ZIP = b"PK\x03\x04"
_BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9"  # torch before 1.6
_SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAFETENSORS |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_TORCH = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
}


class _Unreadable(Exception):
    """Why a file is no checkpoint."""


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a regular file begins as a safetensors file or as a torch archive does."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            begun = file.read(9)
    except OSError:
        return False
    return begun[:4] == _ZIP or begun == _BEFORE_ZIP or (len(begun) == 9 and begun[5:] == b"\0\0\0{")


class CheckpointSuspect:
    """A safetensors file, or what torch.save wrote: a state dict, a dict that has one in it, or a module.

    It shows its weights and gives no answers. Raises FileNotFoundError for a path that does not exist, SuspectError for
    what is no such file.
    """

    settings: Mapping[str, Any] = {}

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fsdecode(path)
        self.facts: list[Fact] = []
        self._file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # O_NONBLOCK: should it be a pipe now
        self._status = _status(self._file)
        try:
            self._entries = dict(_entries(self._file))
            if not self._entries:
                raise _Unreadable("no tensor of floating point is in it")
            self.sha256: str | None = _digest(self._file)
        except Exception as error:  # a hostile file can fail anywhere in there
            self._file.close()
            raise SuspectError(f"{self.name} is no checkpoint that can be read ({one_line(error)})") from None

    def tensors(self, signature: Signature | None = None) -> list[Tensor]:
        """The weights in the order of the file, each with its place in the order of names."""
        weights = weights_of(self._entries)
        kinds = [each.kind for each in weights]
        self.facts = [
            fact("stored_as", count=kinds.count(kind), of=len(kinds), kind=kind)
            for kind in dict.fromkeys(kinds)
            if kind != "float32"
        ]
        self.facts.append(fact("no_graph"))
        by_name = sorted(range(len(weights)), key=lambda number: _by_size(weights[number].name))
        places = {number: place for place, number in enumerate(by_name)}
        return [
            Tensor.unread(each.shape, printable(each.name), partial(self._read, each.read), places[number])
            for number, each in enumerate(weights)
        ]

    def _read(self, read: Callable[[], Weight]) -> Weight:
        try:
            found = read()
        except Exception as error:  # as above
            raise SuspectError(f"{self.name} has a weight that cannot be read ({one_line(error)})") from None
        if _status(self._file) != self._status:
            raise SuspectError(f"{self.name} changes while it is read; verify a copy of it")
        return found

    def adapters(self, shape: Sequence[int], value_range: Range, every: bool = True) -> list[Adapter]:
        self._refuse()

    def answer(self, inputs: Inputs, num_classes: int | None = None) -> Answers:
        self._refuse()

    def limit(self, inputs: Inputs, count: int) -> int:
        return count

    def activations(self, place: int, inputs: Inputs) -> NDArray[np.float32]:
        self._refuse()

    def close(self) -> None:
        self._file.close()

    def _refuse(self) -> NoReturn:
        raise SuspectError(f"{self.name} holds weights and no network that could answer; export it to ONNX")


def _by_size(name: str) -> list[tuple[int, str]]:
    """A name's parts, numbers in it by their size: layer2 before layer10."""
    return [(int(part[:18]), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name, flags=re.ASCII)]


def _status(file: Any) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def _entries(file: Any) -> Iterator[tuple[str, Entry]]:
    begun = file.read(9)
    file.seek(0)
    if begun == _BEFORE_ZIP:
        raise _Unreadable("torch before 1.6 wrote it; load and save it with a newer one")
    return _torch_entries(file) if begun[:4] == _ZIP else _safetensors_entries(file)


def _safetensors_entries(file: Any) -> Iterator[tuple[str, Entry]]:
    """Its header is {name: {"dtype", "shape", "data_offsets"}}, behind its length in 8 bytes."""
    size = os.fstat(file.fileno()).st_size
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(MAXIMUM_HEADER, size - 8):
        raise _Unreadable(f"its header would be {length} bytes long")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, said in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        kind, shape, (start, stop) = _SAFETENSORS.get(said["dtype"]), said["shape"], said["data_offsets"]
        if kind is None:
            continue
        if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
            raise _Unreadable(f"{name[:100]} has a shape or a place that is none")
        if stop > size - 8 - length or stop - start != math.prod(shape) * _dtype(kind).itemsize:
            raise _Unreadable(f"{name[:100]} is not as long as its shape says")
        yield name, Entry(tuple(shape), kind, partial(_numbers, file, 8 + length + start, stop - start, kind, shape))


def _numbers(file: Any, start: int, length: int, kind: str, shape: Sequence[int]) -> Array:
    file.seek(start)
    data = file.read(length)
    if len(data) != length:
        raise _Unreadable("it has become shorter")
    return np.frombuffer(data, _dtype(kind)).reshape(shape).astype(np.float32, copy=False)


def _torch_entries(file: Any) -> Iterator[tuple[str, Entry]]:
    """An archive of NAME/data.pkl, which names the tensors, and of NAME/data/KEY, each the numbers of a storage."""
    archive = zipfile.ZipFile(file)
    files = {each.filename: each for each in archive.infolist()}
    pickles = [name for name in files if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise _Unreadable("an archive that torch has not written")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in files and archive.open(f"{folder}byteorder").read(16) != b"little":
        raise _Unreadable("its numbers are big-endian; save it again on another machine")
    if files[pickles[0]].file_size > MAXIMUM_PICKLE:
        raise _Unreadable(f"its list of tensors is longer than {MAXIMUM_PICKLE} bytes")
    seen: set[StoredTensor] = set()
    for name, tensor in tensors_of(archive.open(pickles[0]).read(MAXIMUM_PICKLE)):
        kind, stored = _TORCH.get(tensor.storage.kind), files.get(f"{folder}data/{tensor.storage.key}")
        if kind is None or tensor in seen:  # tied weights are one
            continue
        seen.add(tensor)
        if stored is None or len(tensor.shape) != len(tensor.strides):
            raise _Unreadable(f"{name[:100]} has no numbers")
        last = tensor.offset + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.strides, strict=True))
        count = last + 1 if math.prod(tensor.shape) else 0
        if count * _dtype(kind).itemsize > stored.file_size or math.prod(tensor.shape) > count:
            raise _Unreadable(f"{name[:100]} is longer than its numbers")
        yield name, Entry(tensor.shape, kind, partial(_view, archive, stored, tensor, kind, count))


def _view(archive: Any, stored: Any, tensor: StoredTensor, kind: str, count: int) -> Array:
    dtype = _dtype(kind)
    data = archive.open(stored).read(count * dtype.itemsize)
    if len(data) != count * dtype.itemsize:
        raise _Unreadable("the archive says more of its sizes than it holds")
    flat = np.frombuffer(data, dtype)[tensor.offset :]
    steps = [step * dtype.itemsize for step in tensor.strides]
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, steps, writeable=False).astype(np.float32, copy=False)


def _dtype(kind: str) -> np.dtype[Any]:
    if kind in ("float16", "float32", "float64"):
        return np.dtype(kind)
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, kind))
    return found
