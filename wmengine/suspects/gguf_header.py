"""What the header of a GGUF file says: its values, and each tensor's name, shape, type and place.

llama.cpp's format: little-endian, texts and lists behind their length in 8 bytes, shapes beginning with the axis that
lies closest together (docs/gguf.md of ggml). The header is followed in the bytes that are at hand: a count that lies
comes to their end.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

_VERSIONS = (2, 3)
_VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_MAXIMUM_AXES = 4  # ggml's own
_MAXIMUM_TENSORS = 200_000


class GgufTensor(NamedTuple):
    """Its type as ggml numbers it, and its place in bytes behind the header."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


class GgufHeader(NamedTuple):
    """values: those that are one number or one text; begin: where the tensors' numbers begin in the file."""

    values: dict[str, Any]
    tensors: list[GgufTensor]
    begin: int


def read_header(data: bytes) -> GgufHeader:
    """The header that a file's first bytes hold whole.

    What is none raises a ValueError, a struct.error, a KeyError or a RecursionError.
    """
    reader = _Reader(data)
    magic, version, tensors, values = reader.numbers("4sIQQ")
    if magic != b"GGUF" or version not in _VERSIONS:
        raise ValueError("it is of another version, or big-endian: convert it again")
    if tensors > _MAXIMUM_TENSORS:
        raise ValueError(f"it would hold {tensors} tensors")
    found = {}
    for _ in range(values):
        name = reader.text()
        found[name] = reader.value(*reader.numbers("I"))
    listed = [reader.tensor() for _ in range(tensors)]
    alignment = found.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError("its numbers would be aligned to nothing")
    return GgufHeader(found, listed, -(-reader.at // alignment) * alignment)


class _Reader:
    """Bytes that are read from the beginning on."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def numbers(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{form}", self._data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return found

    def text(self) -> str:
        return self._bytes(*self.numbers("Q")).decode()

    def value(self, kind: int) -> Any:
        """A number or a text; of a list None."""
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            return self.numbers(_VALUES[kind])[0]
        of, count = self.numbers("IQ")
        if of in _VALUES:
            self._bytes(count * struct.calcsize(f"<{_VALUES[of]}"))
            return None
        for _ in range(count):
            self.value(of)
        return None

    def tensor(self) -> GgufTensor:
        name, (axes,) = self.text(), self.numbers("I")
        if axes > _MAXIMUM_AXES:
            raise ValueError(f"{name[:100]} would have {axes} axes")
        *shape, kind, offset = self.numbers(f"{axes}QIQ")
        return GgufTensor(name, tuple(reversed(shape)), kind, offset)

    def _bytes(self, count: int) -> bytes:
        start, self.at = self.at, self.at + count
        if self.at > len(self._data):
            raise ValueError("its header does not end")
        return self._data[start : self.at]
