"""What a checkpoint's file lists: each tensor's name, shape and type, and what reads its numbers, of three formats.

Files of safetensors and GGUF have a header; a torch archive has a pickle, which is followed by a machine that can call
nothing. All sizes are checked against the file's before memory is taken.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from wmengine._optional import require
from wmengine.suspects.checkpoint_weights import Array, Entry
from wmengine.suspects.gguf_header import read_header
from wmengine.suspects.torch_pickle import StoredTensor, tensors_of

# A hundred thousand tensors take a tenth of these; what they list may take twenty times as much memory.
MAXIMUM_HEADER = MAXIMUM_PICKLE = MAXIMUM_DIRECTORY = 32 << 20
_SPREAD = 16  # numbers that are read or unpacked for each one of a tensor's, at most
_ZIP, _GGUF = b"PK\x03\x04", b"GGUF"
_BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9"  # torch before 1.6
_SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAFETENSORS |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_TORCH = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
}
_GGML = {0: "float32", 1: "float16", 28: "float64", 30: "bfloat16"}
_GGML_INTEGERS = (24, 25, 26, 27)


class UnreadableError(Exception):
    """Why a file is no checkpoint."""


def begins_as_checkpoint(begun: bytes) -> bool:
    """Whether the first nine bytes of a file are those of a safetensors or GGUF file, or of what torch saves."""
    return begun[:4] in (_ZIP, _GGUF) or begun == _BEFORE_ZIP or (len(begun) == 9 and begun[5:] == b"\0\0\0{")


def entries_of(file: Any) -> Iterator[tuple[str, Entry]]:
    """The tensors of floating point in an open file, in its order; they are read from it as long as it is open.

    Raises UnreadableError, or whatever a hostile file makes the libraries raise.
    """
    begun = file.read(9)
    file.seek(0)
    if begun == _BEFORE_ZIP:
        raise UnreadableError("torch before 1.6 wrote it; load and save it with a newer one")
    formats = {_ZIP: _torch_entries, _GGUF: _gguf_entries}
    return formats.get(begun[:4], _safetensors_entries)(file)


def _safetensors_entries(file: Any) -> Iterator[tuple[str, Entry]]:
    """Its header is {name: {"dtype", "shape", "data_offsets"}}, behind its length in 8 bytes."""
    size = os.fstat(file.fileno()).st_size
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(MAXIMUM_HEADER, size - 8):
        raise UnreadableError(f"its header would be {length} bytes long")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, said in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        kind, shape, (start, stop) = _SAFETENSORS.get(said["dtype"]), said["shape"], said["data_offsets"]
        if kind is None:
            continue
        if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
            raise UnreadableError(f"{name[:100]} has a shape or a place that is none")
        if stop > size - 8 - length or stop - start != math.prod(shape) * _dtype(kind).itemsize:
            raise UnreadableError(f"{name[:100]} is not as long as its shape says")
        yield name, Entry(tuple(shape), kind, partial(_numbers, file, 8 + length + start, stop - start, kind, shape))


def _bytes(file: Any, start: int, length: int) -> bytes:
    file.seek(start)
    data: bytes = file.read(length)
    if len(data) != length:
        raise UnreadableError("it has become shorter")
    return data


def _numbers(file: Any, start: int, length: int, kind: str, shape: Sequence[int]) -> Array:
    return np.frombuffer(_bytes(file, start, length), _dtype(kind)).reshape(shape).astype(np.float32, copy=False)


def _gguf_entries(file: Any) -> Iterator[tuple[str, Entry]]:
    """Quantised numbers lie in blocks along the rows, which llama.cpp's own package knows to read."""
    size = os.fstat(file.fileno()).st_size
    header = read_header(file.read(MAXIMUM_HEADER))
    for name, shape, number, offset in header.tensors:
        if number in _GGML_INTEGERS:
            continue
        start, count = header.begin + offset, math.prod(shape)
        if number in _GGML:
            kind = _GGML[number]
            length = count * _dtype(kind).itemsize
            read = partial(_numbers, file, start, length, kind, shape)
        else:
            gguf = require("gguf", extra="gguf")
            form = gguf.GGMLQuantizationType(number)
            block, block_bytes = gguf.GGML_QUANT_SIZES[form]
            if not shape or shape[-1] % block:
                raise UnreadableError(f"{name[:100]} has rows that are no blocks of {form.name}")
            kind, length = form.name.lower(), count // block * block_bytes
            read = partial(_dequantised, file, start, length, form, shape)
        if start + length > size:
            raise UnreadableError(f"{name[:100]} is longer than the file")
        heads = _reordered_heads(name, header.values)
        yield name, Entry(shape, kind, read if heads is None else partial(_in_order, read, heads))


def _dequantised(file: Any, start: int, length: int, form: Any, shape: Sequence[int]) -> Array:
    rows = np.frombuffer(_bytes(file, start, length), np.uint8).reshape(math.prod(shape[:-1]), -1)
    with np.errstate(all="ignore"):  # a block's scale may be any number
        values: Array = require("gguf", extra="gguf").dequantize(rows, form)
    return values.reshape(shape)


def _reordered_heads(name: str, values: Mapping[str, Any]) -> int | None:
    """How many heads a matrix of queries or keys has whose rows llama.cpp's converter has reordered, as it does for its
    architecture "llama"; None for any other tensor."""
    if values.get("general.architecture") != "llama" or not name.startswith("blk."):
        return None
    queries = values.get("llama.attention.head_count")
    if name.endswith(".attn_q.weight"):
        return queries
    return values.get("llama.attention.head_count_kv", queries) if name.endswith(".attn_k.weight") else None


def _in_order(read: Callable[[], Array], heads: int) -> Array:
    """Each head's rows as they were before the converter put one of its second half behind each of its first."""
    values = read()
    return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _torch_entries(file: Any) -> Iterator[tuple[str, Entry]]:
    """An archive of NAME/data.pkl, which names the tensors, and of NAME/data/KEY, each the numbers of a storage."""
    if _directory_bytes(file) > MAXIMUM_DIRECTORY:
        raise UnreadableError("an archive of more files than any network has tensors")
    archive = zipfile.ZipFile(file)
    files = {each.filename: each for each in archive.infolist()}
    pickles = [name for name in files if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise UnreadableError("an archive that torch has not written")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in files and archive.open(f"{folder}byteorder").read(16) != b"little":
        raise UnreadableError("its numbers are big-endian; save it again on another machine")
    if files[pickles[0]].file_size > MAXIMUM_PICKLE:
        raise UnreadableError(f"its list of tensors is longer than {MAXIMUM_PICKLE} bytes")
    seen: set[StoredTensor] = set()
    for name, tensor in tensors_of(archive.open(pickles[0]).read(MAXIMUM_PICKLE)):
        kind, stored = _TORCH.get(tensor.storage.kind), files.get(f"{folder}data/{tensor.storage.key}")
        if kind is None or tensor in seen:  # tied weights are one
            continue
        seen.add(tensor)
        if stored is None or len(tensor.shape) != len(tensor.strides):
            raise UnreadableError(f"{name[:100]} has no numbers")
        last = tensor.offset + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.strides, strict=True))
        count = last + 1 if math.prod(tensor.shape) else 0
        if count * _dtype(kind).itemsize > stored.file_size or math.prod(tensor.shape) > count:
            raise UnreadableError(f"{name[:100]} is longer than its numbers")
        yield name, Entry(tensor.shape, kind, partial(_view, file, archive, stored, tensor, kind, count))


def _directory_bytes(file: Any) -> int:
    """How long an archive's list of files is, which `zipfile` reads as a whole: said in its last 22 bytes, and for
    large archives in a record of 56 before a locator of 20 before these."""
    file.seek(-98, os.SEEK_END)
    record, locator, end = struct.unpack("56s20s22s", file.read(98))
    if end[:4] != b"PK\x05\x06":
        raise UnreadableError("an archive that torch has not written")
    (length,) = struct.unpack_from("<L", end, 12)
    (long,) = struct.unpack_from("<Q", record, 40)
    return max(length, long) if locator[:4] == b"PK\x06\x07" else int(length)


def _view(file: Any, archive: Any, stored: Any, tensor: StoredTensor, kind: str, count: int) -> Array:
    dtype, plain = _dtype(kind), stored.compress_type == zipfile.ZIP_STORED
    first = tensor.offset if plain else 0
    if count - first > _SPREAD * math.prod(tensor.shape):
        raise UnreadableError("it is a few numbers of very many; save a copy of its tensors")
    length = (count - first) * dtype.itemsize
    if plain:
        data = _bytes(file, _begin(file, stored) + first * dtype.itemsize, length)
    else:
        data = archive.open(stored).read(length)
        if len(data) != length:
            raise UnreadableError("the archive says more of its sizes than it holds")
    flat = np.frombuffer(data, dtype)[tensor.offset - first :]
    steps = [step * dtype.itemsize for step in tensor.strides]
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, steps, writeable=False).astype(np.float32, copy=False)


def _begin(file: Any, stored: Any) -> int:
    """Where an archive's file begins: behind a header of 30 bytes, its name and what a writer put there."""
    name, extra = struct.unpack_from("<HH", _bytes(file, stored.header_offset, 30), 26)
    return int(stored.header_offset + 30 + name + extra)


def _dtype(kind: str) -> np.dtype[Any]:
    if kind in ("float16", "float32", "float64"):
        return np.dtype(kind)
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, kind))
    return found
