"""An ONNX file as a suspect: read by this process, looked at by an engine, in a sandbox unless told otherwise."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wmengine.errors import SuspectError
from wmengine.facts import Fact
from wmengine.sandbox import Limits, Supervisor, Worker, WorkerFailure
from wmengine.suspects.adapters import Adapter, Range, adapters
from wmengine.suspects.answers import ABSTAINED, Outputs
from wmengine.suspects.base import (
    CHUNK,
    DEVICE_CHUNK,
    Answers,
    Inputs,
    Signature,
    Tensor,
    ask_in_chunks,
    digest_of,
    padded,
    part_of,
    rows_of,
)
from wmengine.suspects.class_names import check_enough, check_labels
from wmengine.suspects.devices import check_device
from wmengine.suspects.engine_wire import RemoteEngine
from wmengine.suspects.given import Given, given, single_input
from wmengine.suspects.model_file import MAXIMUM_BYTES, LocalSource, ModelFile, Source, read_model
from wmengine.suspects.onnx_engine import Input, OnnxEngine

ISOLATION = ("persistent", "per-model", "none")

PAUSES = (0.0, 0.0, 0.1, 1.0)  # seconds before a worker is started, and again where it did not


class NoWorker(SuspectError):
    """There is no sandboxed worker to be had: through no fault of the suspect, of which nothing was read."""


class Engine(Protocol):
    """What OnnxEngine does here and RemoteEngine does in a sandbox."""

    abandoned: bool
    provider: str
    conditions: tuple[Fact, ...]  # what a verdict must say of where the model ran
    class_names: tuple[str, ...]  # in the model, in its own order, once it is open
    labels: tuple[str, ...]  # what counts instead

    def locations(self, name: str, data: bytes) -> list[str]: ...

    def load(self, name: str, data: bytes, external: dict[str, bytes]) -> None: ...

    def open(self) -> list[Input]: ...

    def run(self, inputs: Inputs) -> Outputs: ...

    def activations(self, place: int, inputs: Inputs) -> NDArray[np.float32]: ...

    def tensors(self) -> tuple[list[Tensor], list[Fact]]: ...

    def begin(self) -> bool: ...

    def interrupt(self) -> None: ...

    def close(self) -> None: ...


class OnnxSuspect:
    """An ONNX file: answers through ONNX Runtime, shows its weights without it.

    isolation: "persistent" (a sandboxed worker that serves one suspect after the other), "per-model" (a fresh worker,
    so that no earlier suspect can have touched it: for evidence), "none" (this process: for your own files). device:
    "cpu", or "cuda" for the first GPU, whose driver needs most of what a sandbox takes away: the facts say so. inputs:
    the value, throughout, of inputs that no mark has, by name, where the usual one is not right. labels: the names of
    all classes in their order, for a file that answers with names in an order that it does not hold. Raises
    FileNotFoundError for a path that does not exist, ValueError for a device that is not there or labels that are none,
    SuspectError for what is not an ONNX file or over a limit.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Source | ModelFile,
        *,
        isolation: str = "persistent",
        limits: Limits | None = None,
        maximum_bytes: int = MAXIMUM_BYTES,
        engine: Engine | None = None,
        device: str = "cpu",
        inputs: Mapping[str, float] | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        named = check_labels(labels)
        if isinstance(source, str | os.PathLike):
            source = LocalSource(source)
        self._engine = engine or open_engine(isolation, limits or Limits(), device)
        try:
            if not isinstance(source, ModelFile):
                source = read_model(source, self._engine.locations, maximum_bytes)
            self.file = source
            self._engine.load(self.file.name, self.file.data, self.file.external)
        except BaseException:
            if engine is None:
                self.close()
            raise
        self._labels = named or ()
        self.name = self.file.name
        self.sha256: str | None = self.file.sha256
        self.facts: list[Fact] = []
        self._values = dict(inputs or {})
        chosen = {name: held for name, held in (("inputs", self._values), ("labels", list(named or ()))) if held}
        self.settings: Mapping[str, Any] = {**chosen, "digest": digest_of(chosen)} if chosen else {}
        self._inputs: list[Input] | None = None

    def adapters(self, shape: Sequence[int], value_range: Range, every: bool = True) -> list[Adapter]:
        """The ways that its declared input leaves open to put images of this shape to it.

        every=False: other scalings than the recorded one only where the graph begins by rescaling its input.
        """
        only = single_input(self.name, self._declared(), shape, self._values)
        return adapters(self.name, only.type, only.shape, shape, value_range, every or only.rescaled)

    def answer(self, inputs: Inputs, num_classes: int | None = None) -> Answers:
        self.facts = list(self._engine.conditions)
        put = self._given(inputs)
        held, said = self._engine.class_names, self._labels
        check_enough(said, num_classes)
        # Scores have no names: where the file says which is whose, they are put into the order said, too.
        known = len(said) == num_classes and sorted(held) == sorted(said)
        self._engine.labels = () if known else said
        answers = ask_in_chunks(
            lambda rows: self._engine.run(put.feeds(rows)),
            put.rows,
            num_classes,
            self.name,
            self.facts,
            put.batch,
            CHUNK if self._engine.provider == "cpu" else DEVICE_CHUNK,
        )
        if (held or said) and answers.kind == "labels":  # a class that was named is not counted
            answers = Answers("classes", answers.values[:, None])
        if not known:
            return answers if said or not held else replace(answers, names=held)
        if answers.kind == "scores":
            return replace(answers, values=answers.values[:, [held.index(name) for name in said]])
        places = np.array([*map(said.index, held), ABSTAINED])
        named = (answers.values >= 0) & (answers.values < len(held))
        return replace(answers, values=places[np.where(named, answers.values, ABSTAINED)])

    def limit(self, inputs: Inputs, count: int) -> int:
        return count

    def tensors(self, signature: Signature | None = None) -> list[Tensor]:
        """The weights in the graph's own order; the inputs are not needed."""
        found, facts = self._engine.tensors()
        self.facts = [*self._engine.conditions, *facts]
        return found

    def activations(self, place: int, inputs: Inputs) -> NDArray[np.float32]:
        self.facts = list(self._engine.conditions)
        put = self._given(inputs)
        parts = []
        for start in range(0, rows_of(put.rows), put.batch or CHUNK):
            rows = part_of(put.rows, start, start + (put.batch or CHUNK))
            count = rows_of(rows)
            parts.append(self._engine.activations(place, put.feeds(padded(rows, put.batch)))[:count])
        return np.concatenate(parts)

    def close(self) -> None:
        self._engine.close()

    def _given(self, inputs: Inputs) -> Given:
        return given(self.name, self._declared(), inputs, self._values, self.facts)

    def _declared(self) -> list[Input]:
        if self._inputs is None:
            self._inputs = self._engine.open()
            names = [each.name for each in self._inputs]
            for each in self._values.keys() - set(names):
                raise SuspectError(f"{self.name} has no input {each!r}, but {', '.join(names[:8])}")
        return self._inputs


_supervisor = Supervisor("wmengine.suspects.engine_wire")
atexit.register(_supervisor.close)


def shared_supervisor() -> Supervisor:
    """This process's template of sandboxed workers: started at the first use, ended with the process."""
    return _supervisor


def open_engine(isolation: str, limits: Limits, provider: str = "cpu", eager: bool = False) -> Engine:
    """An engine in this process, or one in a fresh sandboxed worker; eager: for suspects that will be asked.

    Raises ValueError for an isolation unknown, or a provider that is not there; NoWorker where none can be started.
    """
    if isolation not in ISOLATION:
        raise ValueError(f"isolation must be one of {', '.join(ISOLATION)}, and it is {isolation!r}")
    check_device(provider)
    if isolation == "none":
        from wmengine.ops import get_num_threads

        return OnnxEngine(get_num_threads(), provider)
    return RemoteEngine(lambda prepared: _start_worker(limits, provider == "cpu", prepared), provider, eager)


def _start_worker(limits: Limits, confined: bool, prepared: bool) -> Worker:
    for pause in PAUSES:
        time.sleep(pause)
        try:
            return shared_supervisor().worker(limits, confined, prepared)
        except WorkerFailure as error:  # somebody killed it just now, or there is no memory for it at the moment
            failure = error
    raise NoWorker(f"no sandboxed worker can be started: {failure}")
