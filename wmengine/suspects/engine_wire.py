"""An OnnxEngine at the other end of a socket: `serve` runs in the sandboxed worker, `RemoteEngine` in its client.

Inputs and a model's bytes go out, arrays of numbers and text come back. Expected labels and bits never travel.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.carriers import Tensor
from wmengine.errors import SuspectError
from wmengine.sandbox import wire
from wmengine.sandbox.supervisor import Worker, WorkerFailure
from wmengine.suspects.base import Outputs, one_line
from wmengine.suspects.onnx_engine import Input, OnnxEngine, preload

__all__ = ["RemoteEngine", "preload", "serve"]

Arrays = list[NDArray[Any]]
Answer = tuple[dict[str, Any], Sequence[NDArray[Any]]]

MAXIMUM_QUESTION = 1 << 40  # the client is trusted: its own limits hold
LIST, LOAD, OPEN, RUN, READ = "list external files", "load the model", "create the session", "run", "read the weights"


def serve(connection: socket.socket, mechanisms: Sequence[str]) -> None:
    """Answer questions until the other side closes."""
    engine = OnnxEngine()
    while True:
        try:
            question, arrays = wire.receive(connection, MAXIMUM_QUESTION)
        except wire.WireError:
            return
        try:
            header, answers = _answer(engine, question, arrays, mechanisms)
        except SuspectError as error:
            header, answers = {"error": str(error)}, ()
        except MemoryError:
            header, answers = {"error": f"{question.get('name', 'the model')} needs more memory than it may have"}, ()
        except Exception as error:  # a hostile model can make any library raise anything
            header, answers = {"error": f"{question.get('name', 'the model')} cannot be judged ({one_line(error)})"}, ()
        del arrays
        wire.send(connection, header, answers)


def _answer(engine: OnnxEngine, question: dict[str, Any], arrays: Arrays, mechanisms: Sequence[str]) -> Answer:
    asked = question["ask"]
    if asked == LIST:
        return {"locations": engine.locations(question["name"], arrays[0].tobytes())}, ()
    if asked == LOAD:
        contents = [array.tobytes() for array in arrays]
        engine.load(question["name"], contents[0], dict(zip(question["locations"], contents[1:], strict=True)))
        return {}, ()
    if asked == OPEN:
        inputs = [[each.name, each.type, each.shape, each.rescaled] for each in engine.open()]
        return {"inputs": inputs}, ()
    if asked == RUN:
        outputs = engine.run(question["input"], arrays[0])
        return {"outputs": [name for name, _ in outputs]}, [array for _, array in outputs]
    if asked == READ:
        tensors, notes = engine.tensors()
        return {"sources": [each.source for each in tensors], "notes": notes}, [each.values for each in tensors]
    return {"mechanisms": list(mechanisms)}, ()


class RemoteEngine:
    """OnnxEngine's methods, answered by a sandboxed worker; a worker that fails is a SuspectError like any other."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._name = ""
        self._failure: str | None = None

    def locations(self, name: str, data: bytes) -> list[str]:
        self._name = name
        if b"location" not in data:
            return []
        header, _ = self._ask(LIST, {"name": name}, [_bytes(data)])
        return sorted({str(location) for location in header["locations"]})

    def load(self, name: str, data: bytes, external: Mapping[str, bytes]) -> None:
        self._name = name
        contents = [_bytes(data), *map(_bytes, external.values())]
        self._ask(LOAD, {"name": name, "locations": list(external)}, contents)

    def open(self) -> list[Input]:
        header, _ = self._ask(OPEN)
        return [
            Input(str(name), str(type_), tuple(None if size is None else int(size) for size in shape), bool(rescaled))
            for name, type_, shape, rescaled in header["inputs"]
        ]

    def run(self, name: str, rows: NDArray[Any]) -> Outputs:
        header, arrays = self._ask(RUN, {"name": self._name, "input": name}, [rows])
        return [(str(output), array) for output, array in zip(header["outputs"], arrays, strict=True)]

    def tensors(self) -> tuple[list[Tensor], list[str]]:
        header, arrays = self._ask(READ, {"name": self._name})
        found = [
            Tensor(np.asarray(array, np.float32), str(source))
            for source, array in zip(header["sources"], arrays, strict=True)
        ]
        return found, [str(note) for note in header["notes"]]

    def begin(self) -> bool:
        """The time of the next suspect starts now; False where the worker is gone."""
        self.worker.begin()
        return self.worker.alive

    def close(self) -> None:
        self.worker.close()

    def _ask(self, asked: str, question: Mapping[str, Any] | None = None, arrays: Sequence[Any] = ()) -> Any:
        if self._failure is not None:
            raise SuspectError(self._failure)
        try:
            header, answers = self.worker.ask(asked, dict(question or {}), arrays)
        except WorkerFailure as error:
            self._failure = f"{self._name} cannot be judged: {error}"
            raise SuspectError(self._failure) from None
        if "error" in header:
            raise SuspectError(str(header["error"])[:500])
        return header, answers


def _bytes(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)
