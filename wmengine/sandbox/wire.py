"""Messages between a supervisor and its sandboxed workers: one JSON object and some arrays, over a stream socket.

A frame is the length of the JSON (4 bytes) and of everything after it (8 bytes), the JSON, and the arrays' bytes one
after the other; the JSON's "arrays" lists [dtype, shape] of each. The bytes of a question lie in memory that only the
supervisor can write, where there is such memory with room for them, and the frame says "shared". Nothing is unpickled,
sizes are checked before memory is taken, and every wait ends: what comes from a worker may have been written by a
hostile model.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
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
_SLICE = 1.0  # seconds of one wait
_to_text = json.JSONEncoder(check_circular=False).encode
_NAMES = {np.dtype(name): name for name in DTYPES}
SHARED_BYTES = 64 << 20  # given by the kernel only as they are written, and kept until the worker ends
_SEALS = 0x1 | 0x2 | 0x4 | 0x10  # F_SEAL_SEAL, SHRINK, GROW, and FUTURE_WRITE, which Python has no name for


class WireError(Exception):
    """The other side closed the connection (`closed`), did not answer in time (`late`), or sent what is no frame or one
    too large; header: the JSON of a frame whose arrays did not come."""

    def __init__(self, reason: str, closed: bool = False, late: bool = False) -> None:
        super().__init__(reason)
        self.closed = closed
        self.late = late
        self.header: dict[str, Any] = {}


class Allowance:
    """Seconds that sending and receiving may take together, over as many frames as it is given to.

    Time in which this process itself was stopped (Ctrl-Z) is not the other side's: of each wait at most two slices
    count.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        self.left = seconds
        self._seen = 0.0

    def begin(self) -> None:
        """What was done between two frames is not counted."""
        self._seen = time.monotonic()

    def count(self) -> None:
        """WireError where nothing is left."""
        now = time.monotonic()
        self.left -= min(now - self._seen, 2 * _SLICE)
        self._seen = now
        if self.left <= 0:
            raise WireError("no answer in time", late=True)

    def wait(self, connection: socket.socket, event: int) -> None:
        poll = select.poll()
        poll.register(connection, event)
        ready = False
        while not ready:
            ready = bool(poll.poll(math.ceil(1e3 * min(max(self.left, 0.0), _SLICE))))
            self.count()


class Channel(socket.socket):
    """A socket, and the memory that questions are written to: writeable here, or for the worker to read; or None."""

    shared: Array | None = None

    def share(self) -> int | None:
        """Take memory for questions → its descriptor, for the other end; None where the kernel has none that nobody
        else can write."""
        with contextlib.suppress(OSError, AttributeError):
            descriptor = os.memfd_create("questions", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(descriptor, SHARED_BYTES)
                memory = mmap.mmap(descriptor, SHARED_BYTES)
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            except BaseException:
                os.close(descriptor)
                raise
            self.shared = np.frombuffer(memory, np.uint8)
            return descriptor
        return None


def memory_to_read(descriptor: int) -> Array:
    """What the other end has taken for questions, uint8 [SHARED_BYTES]; its descriptor may be closed then."""
    return np.frombuffer(mmap.mmap(descriptor, SHARED_BYTES, prot=mmap.PROT_READ), np.uint8)


def send(
    connection: socket.socket,
    header: dict[str, Any],
    arrays: Sequence[Array] = (),
    allowance: Allowance | None = None,
) -> None:
    """One frame. Without an allowance it takes as long as it takes; with one the connection must not block."""
    allowance = allowance or Allowance()
    allowance.begin()
    arrays = [np.asarray(array, order="C") for array in arrays]
    described = header | {"arrays": [[_NAMES.get(array.dtype) or array.dtype.name, array.shape] for array in arrays]}
    contents = [array.reshape(-1).view(np.uint8) for array in arrays if array.nbytes]
    size = sum(map(len, contents))
    shared = getattr(connection, "shared", None)
    if shared is not None and shared.flags.writeable and 0 < size <= len(shared):
        np.concatenate(contents, out=shared[:size])
        contents, described["shared"] = [], size
        size = 0
    text = _to_text(described).encode()
    parts: list[bytes | memoryview] = [_LENGTHS.pack(len(text), size) + text, *(each.data for each in contents)]
    if len(text) + size < _PART:  # one call for all
        parts = [b"".join(parts)]
    for part in parts:
        _send_all(connection, part, allowance)


def receive(
    connection: socket.socket,
    maximum_bytes: int,
    allowance: Allowance | None = None,
    before_arrays: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[dict[str, Any], list[Array]]:
    """The next frame, its arrays no more than maximum_bytes in all; WireError where there is none.

    before_arrays: is told the JSON before memory is taken for the arrays.
    """
    allowance = allowance or Allowance()
    allowance.begin()
    # Nearly every answer comes whole with the first call; every call lets go of Python's lock, and may wait for it.
    begun = _receive_some(connection, _PART, allowance)
    while len(begun) < _LENGTHS.size:
        begun += _receive_some(connection, _LENGTHS.size - len(begun), allowance)
    header_bytes, array_bytes = _LENGTHS.unpack(begun[: _LENGTHS.size])
    if header_bytes > MAXIMUM_HEADER:
        raise WireError(f"an answer of {header_bytes} bytes of names, and at most {MAXIMUM_HEADER} are taken")
    if array_bytes > maximum_bytes:
        raise WireError(f"an answer of {array_bytes} bytes, and at most {maximum_bytes} are taken")
    at = _LENGTHS.size + header_bytes
    if len(begun) > at + array_bytes:
        raise WireError("an answer without a question")
    text = _receive_rest(connection, begun[_LENGTHS.size : at], header_bytes, allowance)
    try:
        header = json.loads(str(text, "utf-8"))
        described = [(str(dtype), [int(size) for size in shape]) for dtype, shape in header["arrays"]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):  # int(1e999)
        raise WireError("an answer that cannot be read") from None
    if before_arrays is not None:
        before_arrays(header)
    shared = getattr(connection, "shared", None)
    data: bytes | memoryview
    if "shared" in header and shared is not None and not shared.flags.writeable:
        array_bytes = header["shared"]
        data = shared[:array_bytes].data
    else:
        try:
            data = _receive_rest(connection, begun[at:], array_bytes, allowance)
        except WireError as error:
            error.header = header
            raise
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


def _send_all(connection: socket.socket, data: bytes | memoryview, allowance: Allowance) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[connection.send(view, socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            allowance.wait(connection, select.POLLOUT)
        except OSError:
            raise WireError("the other side is gone", closed=True) from None
        if view:
            allowance.count()


def _receive_some(connection: socket.socket, most: int, allowance: Allowance) -> bytes:
    """Up to `most` bytes, at least one. Who has not all time waits for it first: the other side must think."""
    while True:
        if allowance.left < math.inf:
            allowance.wait(connection, select.POLLIN)
        try:
            read = connection.recv(most)
        except BlockingIOError:
            continue
        except OSError:
            read = b""
        if not read:
            raise WireError("the other side is gone", closed=True)
        return read


def _receive_rest(connection: socket.socket, begun: bytes, count: int, allowance: Allowance) -> bytes | memoryview:
    """`count` bytes that begin with those that have come already."""
    if len(begun) == count:
        return begun
    try:
        # Memory that the system gives only as it is filled: a length that is merely claimed costs nothing.
        buffer = np.empty(count, np.uint8).data
    except MemoryError:
        left = count - len(begun)
        while left:  # the next frame begins after it
            left -= len(_receive_some(connection, min(_PART, left), allowance))
        raise WireError(f"{count} bytes, more than there is memory for") from None
    buffer[: len(begun)] = begun
    view = buffer[len(begun) :]
    while view:
        try:
            read = connection.recv_into(view)
        except BlockingIOError:
            allowance.wait(connection, select.POLLIN)
            continue
        except OSError:
            read = 0
        if read == 0:
            raise WireError("the other side is gone", closed=True)
        view = view[read:]
        if view:
            allowance.count()  # also where there is always a byte more to read
    return buffer
