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
    _send_all(connection, _LENGTHS.pack(len(text), sum(array.nbytes for array in arrays)) + text, deadline)
    for array in arrays:
        if array.nbytes:
            _send_all(connection, array.reshape(-1).view(np.uint8).data, deadline)


def check_silent(connection: socket.socket) -> None:
    """WireError where the other side has said something that nobody has asked for, or is gone."""
    try:
        said = connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return
    except OSError:
        said = b""
    if not said:
        raise WireError("the other side is gone", closed=True)
    raise WireError("an answer without a question")


def receive(
    connection: socket.socket, maximum_bytes: int, deadline: float = math.inf
) -> tuple[dict[str, Any], list[Array]]:
    """The next frame, its arrays read-only no more than maximum_bytes in all; WireError where there is none."""
    header_bytes, array_bytes = _LENGTHS.unpack(_receive_all(connection, _LENGTHS.size, deadline))
    if header_bytes > MAXIMUM_HEADER:
        raise WireError(f"an answer of {header_bytes} bytes of names, and at most {MAXIMUM_HEADER} are taken")
    if array_bytes > maximum_bytes:
        raise WireError(f"an answer of {array_bytes} bytes, and at most {maximum_bytes} are taken")
    try:
        header = json.loads(_receive_all(connection, header_bytes, deadline))
        described = [(str(dtype), [int(size) for size in shape]) for dtype, shape in header["arrays"]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):  # int(1e999)
        raise WireError("an answer that cannot be read") from None
    data = _receive_all(connection, array_bytes, deadline)
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


def _receive_all(connection: socket.socket, count: int, deadline: float) -> bytearray:
    try:
        buffer = bytearray(count)
    except MemoryError:
        if count <= _PART:
            raise
        for start in range(0, count, _PART):  # the next frame begins after it
            _receive_all(connection, min(_PART, count - start), deadline)
        raise WireError(f"{count} bytes, more than there is memory for") from None
    view = memoryview(buffer)
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
