"""An ONNX file as a suspect: read by this process, looked at by an engine, in a sandbox unless told otherwise."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from wmengine.carriers import Tensor
from wmengine.errors import SuspectError
from wmengine.sandbox import Limits, Supervisor, Worker, WorkerFailure
from wmengine.suspects.adapters import FLOATS, Adapter, Range, adapters
from wmengine.suspects.answers import Outputs
from wmengine.suspects.base import CHUNK, DEVICE_CHUNK, ask_in_chunks, check_input_shape
from wmengine.suspects.devices import check_provider
from wmengine.suspects.engine_wire import RemoteEngine
from wmengine.suspects.model_file import MAXIMUM_BYTES, LocalSource, ModelFile, Source, read_model
from wmengine.suspects.onnx_engine import Input, OnnxEngine

MAXIMUM_BATCH, MAXIMUM_BATCH_BYTES = 4096, 256 << 20
ISOLATION = ("persistent", "per-model", "none")

PAUSES = (0.0, 0.0, 0.1, 1.0)  # seconds before a worker is started, and again where it did not


class NoWorker(SuspectError):
    """There is no sandboxed worker to be had: through no fault of the suspect, of which nothing was read."""


class Engine(Protocol):
    """What OnnxEngine does here and RemoteEngine does in a sandbox."""

    abandoned: bool
    provider: str
    conditions: tuple[str, ...]  # what a verdict must say of where the model ran

    def locations(self, name: str, data: bytes) -> list[str]: ...

    def load(self, name: str, data: bytes, external: dict[str, bytes]) -> None: ...

    def open(self) -> list[Input]: ...

    def run(self, name: str, rows: NDArray[Any]) -> Outputs: ...

    def tensors(self) -> tuple[list[Tensor], list[str]]: ...

    def begin(self) -> bool: ...

    def interrupt(self) -> None: ...

    def close(self) -> None: ...


class OnnxSuspect:
    """An ONNX file: answers through ONNX Runtime, shows its weights without it.

    isolation: "persistent" (a sandboxed worker that serves one suspect after the other), "per-model" (a fresh worker,
    so that no earlier suspect can have touched it: for evidence), "none" (this process: for your own files). provider:
    "cpu", or "cuda" for the first GPU, whose driver needs most of what a sandbox takes away: the notes say so. Raises
    FileNotFoundError for a path that does not exist, ValueError for a provider that is not there, SuspectError for what
    is not an ONNX file or over a limit.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Source | ModelFile,
        *,
        isolation: str = "persistent",
        limits: Limits | None = None,
        maximum_bytes: int = MAXIMUM_BYTES,
        engine: Engine | None = None,
        provider: str = "cpu",
    ) -> None:
        if isinstance(source, str | os.PathLike):
            source = LocalSource(source)
        self._engine = engine or open_engine(isolation, limits or Limits(), provider)
        try:
            if not isinstance(source, ModelFile):
                source = read_model(source, self._engine.locations, maximum_bytes)
            self.file = source
            self._engine.load(self.file.name, self.file.data, self.file.external)
        except BaseException:
            self.close()
            raise
        self.name = self.file.name
        self.sha256: str | None = self.file.sha256
        self.notes: list[str] = []
        self._inputs: list[Input] | None = None

    def adapters(self, trigger_shape: Sequence[int], value_range: Range, every: bool = True) -> list[Adapter]:
        """The ways that its declared input leaves open to put triggers of this shape to it.

        every=False: other scalings than the recorded one only where the graph begins by rescaling its input.
        """
        declared = self._input()
        scalings = every or declared.rescaled
        return adapters(self.name, declared.type, declared.shape, trigger_shape, value_range, scalings)

    def query(self, inputs: NDArray[Any], num_classes: int | None = None) -> NDArray[Any]:
        self.notes = list(self._engine.conditions)
        declared = self._input()
        if inputs.dtype.kind == "f" and declared.type in FLOATS and inputs.dtype != FLOATS[declared.type]:
            inputs = inputs.astype(FLOATS[declared.type])
            self.notes.append(f"inputs were cast to {inputs.dtype.name}")
        batch = declared.shape[0] if declared.shape else None
        if declared.shape:  # an input without any declared shape takes everything
            check_input_shape(self.name, declared.shape, inputs)
        most = min(MAXIMUM_BATCH, MAXIMUM_BATCH_BYTES // max(1, inputs[:1].nbytes))
        if batch is not None and batch > most:
            raise SuspectError(f"{self.name} has a fixed batch of {batch}, and at most {most} can be asked at once")
        if batch is not None:
            self.notes.append(f"the suspect has a fixed batch of {batch}")
        return ask_in_chunks(
            lambda rows: self._engine.run(declared.name, rows),
            inputs,
            num_classes,
            self.name,
            self.notes,
            batch,
            CHUNK if self._engine.provider == "cpu" else DEVICE_CHUNK,
        )

    def tensors(self, input_shape: Sequence[int] | None = None) -> list[Tensor]:
        """The weights in the graph's own order; input_shape is not needed."""
        found, notes = self._engine.tensors()
        self.notes = [*self._engine.conditions, *notes]
        return found

    def close(self) -> None:
        self._engine.close()

    def _input(self) -> Input:
        if self._inputs is None:
            self._inputs = self._engine.open()
        if len(self._inputs) != 1:
            names = ", ".join(each.name for each in self._inputs) or "none"
            raise SuspectError(f"{self.name} needs {len(self._inputs)} inputs ({names}), and a trigger is one")
        return self._inputs[0]


_supervisor = Supervisor("wmengine.suspects.engine_wire")
atexit.register(_supervisor.close)


def shared_supervisor() -> Supervisor:
    """This process's template of sandboxed workers: started at the first use, ended with the process."""
    return _supervisor


def open_engine(isolation: str, limits: Limits, provider: str = "cpu") -> Engine:
    """An engine in this process, or one in a fresh sandboxed worker.

    Raises ValueError for an isolation unknown, or a provider that is not there; NoWorker where none can be started.
    """
    if isolation not in ISOLATION:
        raise ValueError(f"isolation must be one of {', '.join(ISOLATION)}, and it is {isolation!r}")
    check_provider(provider)
    if isolation == "none":
        from wmengine.ops import get_num_threads

        return OnnxEngine(get_num_threads(), provider)
    return RemoteEngine(lambda prepared: _start_worker(limits, provider == "cpu", prepared), provider)


def _start_worker(limits: Limits, confined: bool, prepared: bool) -> Worker:
    for pause in PAUSES:
        time.sleep(pause)
        try:
            return shared_supervisor().worker(limits, confined, prepared)
        except WorkerFailure as error:  # somebody killed it just now, or there is no memory for it at the moment
            failure = error
    raise NoWorker(f"no sandboxed worker can be started: {failure}")
