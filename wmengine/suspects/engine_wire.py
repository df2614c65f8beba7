"""An OnnxEngine at the other end of a socket: `serve` runs in the sandboxed worker, `RemoteEngine` in its client.

Inputs and a model's bytes go out, arrays of numbers and text come back. Expected labels and bits never travel.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from wmengine.errors import MORE_MEMORY, OtherTask, SuspectError, SuspectGone, printable
from wmengine.facts import Fact, fact
from wmengine.ops.reference import MOST_LEVEL
from wmengine.sandbox import MECHANISMS, wire
from wmengine.sandbox.supervisor import TemplateGone, Worker, WorkerFailure
from wmengine.suspects.answers import Outputs, Predicted
from wmengine.suspects.base import Inputs, Tensor, Weight, one_line
from wmengine.suspects.class_names import MAXIMUM_NAMES
from wmengine.suspects.graph_limits import MAXIMUM_OUTPUTS
from wmengine.suspects.onnx_engine import Input, OnnxEngine, may_name_files, preload, prepare

__all__ = ["RemoteEngine", "preload", "prepare", "serve"]

Arrays = list[NDArray[Any]]
Result = TypeVar("Result")
Answer = tuple[dict[str, Any], Sequence[NDArray[Any]]]

MAXIMUM_QUESTION = 1 << 40  # the client is trusted: its own limits hold
LIST, LOAD, OPEN, RUN = "list external files", "load the model", "create the session", "run"
FIND, READ, TAP = "find the weights", "read a weight", "read activations"
_OF_WEIGHTS = {"stored_as": ("count", "of", "kind"), "unread": ("count",)}  # facts that reading them has
MAXIMUM_NAME, MAXIMUM_FACTS = 200, 20  # characters of a tensor's name, or of a value in a fact


def serve(connection: socket.socket, mechanisms: Sequence[str]) -> None:
    """Answer questions until the other side closes."""
    engine = OnnxEngine()

    def make_room(question: dict[str, Any]) -> None:
        if question["ask"] in (LIST, LOAD):
            engine.close()

    while True:
        try:
            question, arrays = wire.receive(connection, MAXIMUM_QUESTION, before_arrays=make_room)
        except wire.WireError as error:
            if error.closed:
                return
            said = f"the model {MORE_MEMORY} ({error})"
            wire.send(connection, {"error": said, "word": error.header["word"]})
            continue
        try:
            header, answers = _answer(engine, question, arrays, mechanisms)
        except SuspectError as error:
            header, answers = {"error": str(error), "other_task": isinstance(error, OtherTask)}, ()
        except MemoryError:
            header, answers = {"error": f"{question.get('name', 'the model')} {MORE_MEMORY}"}, ()
        except Exception as error:  # a hostile model can make any library raise anything
            header, answers = {"error": f"{question.get('name', 'the model')} cannot be judged ({one_line(error)})"}, ()
        del arrays
        wire.send(connection, header | {"word": question.get("word")}, answers)
        del answers  # so that the next model finds the memory in one piece


def _answer(engine: OnnxEngine, question: dict[str, Any], arrays: Arrays, mechanisms: Sequence[str]) -> Answer:
    asked = question["ask"]
    header: dict[str, Any]
    if asked == LIST:
        return {"locations": engine.locations(question["name"], arrays[0].tobytes())}, ()
    if asked == LOAD:
        files = 1 + len(question["locations"])
        contents, first = [array.tobytes() for array in arrays[:files]], arrays[files:]
        arrays.clear()  # large models have room once less
        engine.load(question["name"], contents[0], dict(zip(question["locations"], contents[1:], strict=True)))
        try:
            opened = _open(engine, question) if question["open"] else {}
        except SuspectError as error:  # its weights may be read all the same
            return {"unopened": str(error)}, ()
        if opened and first and opened["inputs"] == question["declared"]:
            with contextlib.suppress(Exception):  # asked alone, it says why
                header, answers = _run(engine, question, [np.require(rows, requirements="A") for rows in first])
                return opened | header, answers
        return opened, ()
    if asked == OPEN:
        return _open(engine, question), ()
    if asked == RUN:
        return _run(engine, question, arrays)
    if asked == FIND:
        found, facts = engine.tensors()
        header = {"facts": [[each.code, dict(each.values)] for each in facts]}
        ranks = np.array([len(each.shape) for each in found], np.uint8)
        sizes = np.array([size for each in found for size in each.shape], np.int64)
        names = "\n".join(printable(each.source[:MAXIMUM_NAME]) for each in found).encode()
        return header, [ranks, sizes, _bytes(names)]
    if asked == READ:
        values, factors = engine.tensors()[0][question["number"]].read()
        return {}, [values] if factors is None else [values, factors]
    if asked == TAP:
        return {}, [engine.activations(question["place"], dict(zip(question["inputs"], arrays, strict=True)))]
    return {"mechanisms": list(mechanisms)}, ()


def _open(engine: OnnxEngine, question: dict[str, Any]) -> dict[str, Any]:
    engine.provider, engine.device_bytes = question["provider"], question["device_bytes"]
    return {"inputs": list(map(_described, engine.open())), "class_names": engine.class_names}


def _described(each: Input) -> list[Any]:
    return [each.name, each.type, list(each.shape), each.rescaled]


def _run(engine: OnnxEngine, question: dict[str, Any], arrays: Arrays) -> Answer:
    engine.labels = tuple(question["labels"])
    outputs = engine.run(dict(zip(question["inputs"], arrays, strict=True)))
    stayed = [value if isinstance(value, Predicted) else None for _, value in outputs]
    header = {"outputs": [name for name, _ in outputs], "classes": [each and each.classes for each in stayed]}
    values = [each.labels if each else value for each, (_, value) in zip(stayed, outputs, strict=True)]
    return header, values + [each.levels for each in stayed if each]


@dataclass(frozen=True)
class _First:
    """What a suspect was asked first, by the inputs that it declares."""

    declared: list[Input]
    inputs: dict[str, NDArray[Any]]

    def is_same(self, inputs: Inputs) -> bool:
        return list(inputs) == list(self.inputs) and all(
            rows.dtype == known.dtype and np.array_equal(rows, known)
            for rows, known in zip(inputs.values(), self.inputs.values(), strict=True)
        )


class RemoteEngine:
    """OnnxEngine's methods, answered by a sandboxed worker; a worker that fails is a SuspectError like any other.

    An answer that is not what was asked for costs the worker: whatever wrote it is no engine of ours any more. Each
    question comes with a word that nobody can know, and its answer repeats it: what a model has said before is not
    taken for an answer. start(prepared): starts a worker; the first is not asked to be prepared for reading weights, as
    most never need to. eager: sessions are created as models are loaded, and where their inputs are those of the
    suspect before, what that one was asked first is asked too, all in one exchange: for what will be asked.
    """

    def __init__(self, start: Callable[[bool], Worker], provider: str = "cpu", eager: bool = False) -> None:
        self._start = start
        self.worker = start(False)
        self.provider = provider
        self.conditions = tuple(_conditions(self.worker, provider))
        self._eager = eager
        self._name = ""
        self._loaded: tuple[bytes, Mapping[str, bytes]] = b"", {}
        self._inputs: list[Input] | None = None  # of the session, once there is one
        self._unopened: str | None = None  # why there can be none
        self._first: _First | None = None  # of the suspect before
        self._answered: Outputs | None = None  # to the same, by this one
        self._asked = False  # whether this one was asked anything but that
        self._failure: str | None = None
        self._served = False  # other suspects, before the one to come
        self._spent = False
        self.abandoned = False
        self.class_names: tuple[str, ...] = ()  # of the session
        self.labels: tuple[str, ...] = ()

    def locations(self, name: str, data: bytes) -> list[str]:
        self._name = name
        if not may_name_files(data):
            return []
        return self._ask_first(LIST, _read_locations, {"name": name}, [_bytes(data)])

    def load(self, name: str, data: bytes, external: Mapping[str, bytes]) -> None:
        self._name, self._loaded, self._inputs, self._unopened = name, (data, external), None, None
        contents = [_bytes(data), *map(_bytes, external.values())]
        question = {"name": name, "locations": list(external), "open": self._eager, **self._place()}
        first, more = self._first, []
        if first is not None and self._served:
            question |= {"declared": list(map(_described, first.declared)), "inputs": list(first.inputs)}
            question["labels"], more = self.labels, [*first.inputs.values()]
        self._inputs, self._unopened, self._answered = self._ask_first(
            LOAD, self._read_loaded, question, contents, more
        )
        self._asked = False
        self._spent |= self._unopened is not None

    def open(self) -> list[Input]:
        if self._unopened is not None:
            raise SuspectError(self._unopened)
        if self._inputs is None:
            self._inputs = self._ask(OPEN, self._read_opened, self._place())
        return self._inputs

    def _place(self) -> dict[str, Any]:
        return {"provider": self.provider, "device_bytes": self.worker.limits.memory_bytes}

    def run(self, inputs: Inputs) -> Outputs:
        answered, self._answered = self._answered, None
        if answered is not None and self._first is not None and self._first.is_same(inputs):
            self._asked = True
            return answered
        question = {"name": self._name, "inputs": list(inputs), "labels": self.labels}
        found = self._ask(RUN, _read_outputs, question, [*inputs.values()])
        if self._eager and self._inputs is not None and not self._asked:
            self._first = _First(self._inputs, {name: rows.copy() for name, rows in inputs.items()})
        self._asked = True
        return found

    def activations(self, place: int, inputs: Inputs) -> NDArray[np.float32]:
        if not self.worker.prepared:
            self._prepare()
        question = {"name": self._name, "place": place, "inputs": list(inputs)}
        return self._ask(TAP, _read_activations, question, [*inputs.values()])

    def tensors(self) -> tuple[list[Tensor], list[Fact]]:
        if not self.worker.prepared:  # and locked down, so that it cannot be any more
            self._prepare()
        loaded = self._loaded

        def read(number: int, shape: tuple[int, ...]) -> Weight:
            if self._loaded is not loaded:
                raise SuspectError("another suspect has been loaded since these weights were found; read them before")
            return self._ask(READ, partial(_read_weight, shape), {"name": self._name, "number": number})

        found, facts = self._ask(FIND, _read_found, {"name": self._name})
        return [
            Tensor.unread(shape, source, partial(read, number, shape)) for number, (shape, source) in enumerate(found)
        ], facts

    def _read_opened(self, header: dict[str, Any], arrays: Arrays) -> list[Input]:
        names = [printable(str(each), MAXIMUM_NAME) for each in header["class_names"][:MAXIMUM_NAMES]]
        self.class_names = tuple(dict.fromkeys(names))
        return _read_inputs(header)

    def _read_loaded(
        self, header: dict[str, Any], arrays: Arrays
    ) -> tuple[list[Input] | None, str | None, Outputs | None]:
        """The session's inputs where it was created too, why it could not be, and its answers where it was asked."""
        if "unopened" in header:
            return None, printable(str(header["unopened"]), 500), None
        outputs = _read_outputs(header, arrays) if "outputs" in header else None
        return self._read_opened(header, arrays) if "inputs" in header else None, None, outputs

    def _prepare(self) -> None:
        """Go on with a worker that can read weights, as far as this one has come."""
        before, opened = self.worker, self._inputs is not None
        try:
            self.worker = self._start(True)
        except SuspectError as error:  # there is none to be had, for the next suspect neither
            self.abandoned, self._failure = True, str(error)
            raise
        finally:
            before.close()
        self.worker.go_on_for(before)
        self.load(self._name, *self._loaded)
        if opened:
            self.open()

    def begin(self) -> bool:
        """The time of the next suspect starts now; False where the worker is gone, or fit for no other suspect.

        A model that failed may have left its memory behind: its worker serves no other.
        """
        if self._spent or self._failure is not None:
            return False
        self._loaded, self._served = (b"", {}), True
        self.worker.begin()
        return True

    def interrupt(self) -> None:
        """From another thread: the question of the moment fails."""
        self.worker.interrupt()

    def close(self) -> None:
        self.worker.close()

    def _ask_first(
        self,
        asked: str,
        read: Callable[[dict[str, Any], Arrays], Result],
        question: Mapping[str, Any],
        arrays: Sequence[Any],
        more: Sequence[Any] = (),
    ) -> Result:
        """The first question about a suspect. The worker lets go of the suspect before first, and what goes wrong as it
        does so is not put down to this one: a fresh worker is asked then, and without the arrays that are `more` than
        the question needs."""
        served, self._served = self._served, False
        if served:
            try:
                return self._ask(asked, read, question, [*arrays, *more])
            except SuspectGone:
                if self.abandoned:
                    raise
            self.worker, self._failure = self._start(False), None
        return self._ask(asked, read, question, arrays)

    def _ask(
        self,
        asked: str,
        read: Callable[[dict[str, Any], Arrays], Result],
        question: Mapping[str, Any] | None = None,
        arrays: Sequence[Any] = (),
    ) -> Result:
        if self._failure is not None:
            raise SuspectGone(self._failure)
        word = os.urandom(16).hex()
        try:
            header, answers = self.worker.ask(asked, {**(question or {}), "word": word}, arrays)
        except WorkerFailure as error:
            self.abandoned = isinstance(error, TemplateGone)
            self._failure = f"{self._name} cannot be judged: {error}"
            raise SuspectGone(self._failure) from None
        try:
            if header["word"] != word:
                raise ValueError("an answer to something else")
            if "error" in header:
                self._spent |= asked not in (LIST, LOAD)
                raise (OtherTask if header.get("other_task") else SuspectError)(printable(str(header["error"]), 500))
            return read(header, answers)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            self.worker.close()
            self._failure = f"{self._name} cannot be judged: it gave no answer that can be read while asked to {asked}"
            raise SuspectGone(self._failure) from None


def _conditions(worker: Worker, provider: str) -> Iterator[Fact]:
    """What a verdict must say of the sandbox where it is less than it could be."""
    missing = [name for name in MECHANISMS if name not in worker.mechanisms]
    if provider != "cpu":
        yield fact("gpu_sandbox", missing=" and ".join(missing))
    elif missing:
        yield fact("sandbox_without", missing=" and no ".join(missing))


def _read_locations(header: dict[str, Any], arrays: Arrays) -> list[str]:
    found = sorted({str(location) for location in header["locations"]})
    "".join(found).encode()  # a ValueError for what is no Unicode, and no path
    return found


def _read_inputs(header: dict[str, Any]) -> list[Input]:
    found = [
        Input(str(name), str(type_), tuple(None if size is None else int(size) for size in shape), bool(rescaled))
        for name, type_, shape, rescaled in header["inputs"]
    ]
    if any(size is not None and size < 1 for each in found for size in each.shape):
        raise ValueError("not what an engine says of a size")
    return found


def _read_outputs(header: dict[str, Any], arrays: Arrays) -> Outputs:
    names, classes = list(header["outputs"]), header["classes"]
    if len(names) > MAXIMUM_OUTPUTS:
        raise ValueError("not what a graph is let through with")
    stayed = [index for index, each in enumerate(classes) if each is not None]
    levels = dict(zip(stayed, arrays[len(names) :], strict=True))
    return [
        (str(name), _read_predicted(array, each, levels[index]) if index in levels else array)
        for index, (name, each, array) in enumerate(zip(names, classes, arrays[: len(names)], strict=True))
    ]


def _read_predicted(labels: NDArray[Any], classes: Any, levels: NDArray[Any]) -> Predicted:
    if labels.dtype != np.int32 or labels.ndim != 1 or type(classes) is not int or classes < 1:
        raise ValueError("not what an engine says of scores that stayed on their device")
    if levels.dtype != np.int8 or levels.shape != (len(labels), classes):
        raise ValueError("not what an engine says of the levels of scores that stayed on their device")
    if ((levels < -MOST_LEVEL) | (levels > MOST_LEVEL)).any():
        raise ValueError("not what an engine says of a level")
    return Predicted(labels, classes, levels)


def _read_found(header: dict[str, Any], arrays: Arrays) -> tuple[list[tuple[tuple[int, ...], str]], list[Fact]]:
    """The shapes and the names of weights."""
    ranks, sizes, text = arrays
    names = text.tobytes().decode().split("\n") if len(ranks) else []
    if [(each.dtype.name, each.ndim) for each in arrays] != [("uint8", 1), ("int64", 1), ("uint8", 1)]:
        raise ValueError("not what weights are found as")
    if len(names) != len(ranks):
        raise ValueError("not as many names as weights")
    if (ranks < 2).any() or (sizes < 1).any() or sizes.shape != (ranks.sum(dtype=np.int64),):
        raise ValueError("not the shapes of weights")
    shapes = np.split(sizes, np.cumsum(ranks, dtype=np.int64)[:-1])
    found = [(tuple(map(int, shape)), printable(name)) for shape, name in zip(shapes, names, strict=False)]
    return found, [_read_fact(code, values) for code, values in header["facts"][:MAXIMUM_FACTS]]


def _read_weight(shape: tuple[int, ...], header: dict[str, Any], arrays: Arrays) -> Weight:
    values, *rest = arrays
    if values.dtype != np.float32 or values.shape != shape:
        raise ValueError("not what a weight is read as")
    if len(rest) > 1 or any(each.dtype != np.float32 or each.shape != shape[:1] for each in rest):
        raise ValueError("not what normalisations are read as")
    return values, rest[0] if rest else None


def _read_fact(code: Any, values: Any) -> Fact:
    """A fact of a worker's: a sentence of ours, with short words of its own, and no others."""
    return fact(code, **{name: _value(values[name]) for name in _OF_WEIGHTS[code]})


def _value(value: Any) -> str | int:
    return value if type(value) is int and value < 1 << 53 else printable(str(value), MAXIMUM_NAME)


def _read_activations(header: dict[str, Any], arrays: Arrays) -> NDArray[np.float32]:
    (found,) = arrays
    if found.dtype != np.float32 or found.ndim != 2:
        raise ValueError("not what activations are read as")
    return found


def _bytes(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)
