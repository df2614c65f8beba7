"""Messages between a supervisor and its sandboxed workers: one JSON object and some arrays, over a stream socket.

A frame is the length of the JSON (4 bytes) and of everything after it (8 bytes), the JSON, and the arrays' bytes one
after the other; the JSON's "arrays" lists [dtype, shape] of each. Nothing is unpickled, sizes are checked before memory
is taken, and every wait has a deadline: what comes from a worker may have been written by a hostile model.
"""

from __future__ import annotations

import json
import math
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

MAXIMUM_HEADER = 1 << 20
DTYPES = frozenset(
    ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64"]
)
_PART = 1 << 16
_LENGTHS = struct.Struct("<IQ")


class WireError(Exception):
    """The other side closed the connection (`closed`), did not answer in time (`late`), or sent what is no frame or one
    too large."""

    def __init__(self, reason: str, closed: bool = False, late: bool = False) -> None:
        super().__init__(reason)
        self.closed = closed
        self.late = late


def send(
    connection: socket.socket, header: dict[str, Any], arrays: Sequence[Array] = (), deadline: float = math.inf
) -> None:
    """One frame. `deadline` is a time of time.monotonic(); the connection must not block."""
    arrays = [np.asarray(array, order="C") for array in arrays]
    described = header | {"arrays": [[array.dtype.name, list(array.shape)] for array in arrays]}
    text = json.dumps(described).encode()
    parts: list[bytes | memoryview] = [_LENGTHS.pack(len(text), sum(array.nbytes for array in arrays)) + text]
    parts += [array.reshape(-1).view(np.uint8).data for array in arrays if array.nbytes]
    if sum(map(len, parts)) <= _PART:  # one call for all
        parts = [b"".join(parts)]
    for part in parts:
        _send_all(connection, part, deadline)


def receive(
    connection: socket.socket, maximum_bytes: int, deadline: float = math.inf
) -> tuple[dict[str, Any], list[Array]]:
    """The next frame, its arrays read-only no more than maximum_bytes in all; WireError where there is none."""
    # Nearly every answer comes whole with the first call; every call lets go of Python's lock, and may wait for it.
    begun = _receive_some(connection, _PART, deadline)
    while len(begun) < _LENGTHS.size:
        begun += _receive_some(connection, _LENGTHS.size - len(begun), deadline)
    header_bytes, array_bytes = _LENGTHS.unpack(begun[: _LENGTHS.size])
    if header_bytes > MAXIMUM_HEADER:
        raise WireError(f"an answer of {header_bytes} bytes of names, and at most {MAXIMUM_HEADER} are taken")
    if array_bytes > maximum_bytes:
        raise WireError(f"an answer of {array_bytes} bytes, and at most {maximum_bytes} are taken")
    at = _LENGTHS.size + header_bytes
    if len(begun) > at + array_bytes:
        raise WireError("an answer without a question")
    text = _receive_rest(connection, begun[_LENGTHS.size : at], header_bytes, deadline)
    data = _receive_rest(connection, begun[at:], array_bytes, deadline)
    try:
        header = json.loads(text)
        described = [(str(dtype), [int(size) for size in shape]) for dtype, shape in header["arrays"]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):  # int(1e999)
        raise WireError("an answer that cannot be read") from None
    arrays, at = [], 0
    for dtype, shape in described:
        if dtype not in DTYPES or any(size < 0 for size in shape) or len(shape) > 32:
            raise WireError("an answer that cannot be read")
        count = math.prod(shape)
        size = count * np.dtype(dtype).itemsize
        if at + size > array_bytes:
            raise WireError("an answer whose arrays are longer than itself")
        try:
            arrays.append(np.frombuffer(data, dtype, count, at).reshape(shape) if count else np.empty(shape, dtype))
        except (ValueError, OverflowError):  # a shape like [0, 2^40, 2^40]
            raise WireError("an answer that cannot be read") from None
        at += size
    if at != array_bytes:
        raise WireError("an answer whose arrays are shorter than itself")
    return header, arrays


def _send_all(connection: socket.socket, data: bytes | memoryview, deadline: float) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[connection.send(view, socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            _wait(connection, select.POLLOUT, deadline)
        except OSError:
            raise WireError("the other side is gone", closed=True) from None


def _receive_some(connection: socket.socket, most: int, deadline: float) -> bytes:
    """Up to `most` bytes, at least one. Who has a deadline waits for it first: the other side must think."""
    while True:
        if deadline < math.inf:
            _wait(connection, select.POLLIN, deadline)
        try:
            read = connection.recv(most)
        except BlockingIOError:
            continue
        except OSError:
            read = b""
        if not read:
            raise WireError("the other side is gone", closed=True)
        return read


def _receive_rest(connection: socket.socket, begun: bytes, count: int, deadline: float) -> bytes | bytearray:
    """`count` bytes that begin with those that have come already."""
    if len(begun) == count:
        return begun
    try:
        buffer = bytearray(count)
    except MemoryError:
        left = count - len(begun)
        while left:  # the next frame begins after it
            left -= len(_receive_some(connection, min(_PART, left), deadline))
        raise WireError(f"{count} bytes, more than there is memory for") from None
    buffer[: len(begun)] = begun
    view = memoryview(buffer)[len(begun) :]
    while view:
        try:
            read = connection.recv_into(view)
        except BlockingIOError:
            _wait(connection, select.POLLIN, deadline)
            continue
        except OSError:
            read = 0
        if read == 0:
            raise WireError("the other side is gone", closed=True)
        view = view[read:]
    return buffer


def _wait(connection: socket.socket, event: int, deadline: float) -> None:
    left = deadline - time.monotonic()
    poll = select.poll()
    poll.register(connection, event)
    if left <= 0 or not poll.poll(None if left == math.inf else math.ceil(1e3 * left)):
        raise WireError("no answer in time", late=True)
