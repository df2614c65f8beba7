"""A suspect behind a network address: asked a budgeted number of inputs, politely.

What goes out is inputs, never labels. What an endpoint refuses or answers unreadably is a miss and noted; so is what
the budget or the time did not allow, and a miss can never convict anybody. Only where nothing at all is answered, the
suspect cannot be judged.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wmengine.carriers import Tensor
from wmengine.errors import SuspectError, printable
from wmengine.suspects.adapters import LAYOUT_NAMES, SCALING_NAMES, Adapter, Range, adapters
from wmengine.suspects.answers import ABSTAINED, Outputs, Reading, choose_readings, describe, of_two_classes, read_all
from wmengine.suspects.base import CHUNK, URL_SCHEMES, is_url, one_line
from wmengine.suspects.http_client import hide, shown
from wmengine.suspects.inference_protocol import DTYPES, Declared, RestModel, choose_input
from wmengine.suspects.patience import Patience, Refused, Spent, Unavailable
from wmengine.suspects.request_template import TemplateModel

# What a server may make of a request by declaring a fixed batch: JSON takes ten times as much memory.
MAXIMUM_BATCH_BYTES = 64 << 20
# So many requests in a row that failed in all their tries end the asking.
FAILURES = 3
# What a triggers' datatype is called where ONNX Runtime names it.
_TYPES = {"FP32": "tensor(float)", "FP16": "tensor(float16)", "FP64": "tensor(double)", "UINT8": "tensor(uint8)"}


class Model(Protocol):
    """One way to talk to a served model: Open Inference Protocol over REST or gRPC, or a template."""

    name: str
    secrets: tuple[str, ...]

    def inputs(self, seconds: float) -> list[Declared]: ...

    def ask(self, to: Declared, rows: NDArray[Any], seconds: float) -> Outputs: ...

    def close(self) -> None: ...


def endpoint(
    url: str,
    *,
    request: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    input: str | None = None,
    output: str | None = None,
    datatype: str | None = None,
    layout: str | None = None,
    scaling: str = "as recorded",
    labels: Sequence[str] | None = None,
    batch: int | None = None,
    budget: int | None = None,
    rate: float | None = None,
    tries: int = 5,
    timeout: float = 30.0,
    deadline: float = 600.0,
) -> EndpointSuspect:
    """A suspect that answers over the network, to hand to `verify`.

        suspect = endpoint("https://host/v2/models/detector", layout="channels last", budget=200, rate=5)
        verdict = verify(suspect, "acme-adi.wm")

    url: a model of the Open Inference Protocol, https://HOST/…/v2/models/NAME[/versions/V] or grpcs://HOST:PORT/NAME[/V]
    (http and grpc without TLS), or any service that `request`, a template (docs/endpoints.md), says how to ask.
    headers: sent with every request; ${NAME} stands for an environment variable. input, output: their names; datatype:
    "FP32", "FP16", "FP64" or "UINT8"; layout: "as recorded", "channels last", "flat" or "flat, channels last"; scaling:
    "as recorded", "0 to 1", "0 to 255", "-1 to 1", "ImageNet", or "any" to try and pay for all. What is not given
    is taken from what the server says of its model, and as the mark recorded it where it says nothing. labels: the
    names of all classes in their order, for a service that answers with names. batch: inputs in one request, 32 or what
    the server fixes; budget: inputs sent in all, tries included; rate: inputs per second; tries: for one request, with
    pauses between them that double; timeout: seconds for one; deadline: seconds in all.

    Raises ValueError for a URL, a template or an option that is none. Nothing is sent before the suspect is asked.
    """
    _positive(batch=batch, budget=budget, rate=rate, tries=tries, timeout=timeout, deadline=deadline)
    for name, value in {"input": input, "output": output}.items():
        if value is not None and not (isinstance(value, str) and value):
            raise ValueError(f"{name} must be a name, and it is {value!r}")
    _one_of("datatype", datatype, (None, *_TYPES))
    _one_of("layout", layout, (None, *LAYOUT_NAMES))
    _one_of("scaling", scaling, ("any", *SCALING_NAMES))
    if labels is not None and (
        not isinstance(labels, list | tuple)
        or not all(isinstance(label, str) for label in labels)
        or len(set(labels)) != len(labels)
        or len(labels) < 2
    ):
        raise ValueError("labels must be the names of all classes, in their order, each once")
    if not is_url(url):
        raise ValueError(f"an endpoint is a URL that begins with {', '.join(URL_SCHEMES)}, and this is {shown(url)!r}")
    model: Model
    outputs = [] if output is None else [output]
    if request is not None:
        template = TemplateModel(url, headers, request, labels)
        if template.encoding == "png" and (datatype not in (None, "UINT8") or layout not in (None, "as recorded")):
            raise ValueError("a PNG holds bytes, channels last: leave datatype and layout out")
        if template.single and batch not in (None, 1):
            raise ValueError("the request holds ${input}, a single one: leave batch out")
        if input is not None or output is not None:
            raise ValueError("input and output are names of the Open Inference Protocol: a request says where to look")
        batch = 1 if template.single else batch
        datatype = "UINT8" if template.encoding == "png" else datatype
        model = template
    elif url.lower().startswith("grpc"):
        from wmengine.suspects.inference_grpc import GrpcModel

        model = GrpcModel(url, headers, outputs, labels)
    else:
        model = RestModel(url, headers, outputs, labels)
    patience = Patience(rate, budget, tries, timeout, deadline)
    return EndpointSuspect(model, patience, input, output, datatype, layout, scaling, batch, labels is not None)


def read_options(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The options of `endpoint` from a JSON file. Raises ValueError for what is none."""
    try:
        options = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({one_line(error)})") from None
    known = list(endpoint.__kwdefaults__ or ())
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold one JSON object, with the options {', '.join(known)}")
    for name in options:
        if name not in known:
            raise ValueError(f"{path} holds {name!r}, which is no option; these are: {', '.join(known)}")
    for name in ("request", "headers"):
        if not isinstance(options.get(name, {}), dict):
            raise ValueError(f"{path}: {name} must be a JSON object")
    return options


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError where it says something twice, as only one of the two would count."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for place, (name, _) in enumerate(pairs) if name in dict(pairs[:place]))
        raise ValueError(f"it gives {twice!r} twice")
    return found


class EndpointSuspect:
    """What `endpoint` makes: a suspect of the usual kind. Budget and deadline are for its whole life."""

    def __init__(
        self,
        model: Model,
        patience: Patience,
        input: str | None,
        output: str | None,
        datatype: str | None,
        layout: str | None,
        scaling: str,
        batch: int | None,
        named: bool,
    ) -> None:
        self.name = model.name
        self.sha256: str | None = None
        self.notes: list[str] = []
        self.unasked: dict[int, str] = {}
        self.refused: dict[int, str] = {}
        self._model = model
        self._patience = patience
        self._wanted = (input, datatype)
        self._output = output
        self._layout = layout
        self._scaling = scaling
        self._batch = batch
        self._overruled = batch is not None  # what the server says of its batch does not count
        self._batches_work = False  # whether more than one input at once was ever answered
        self._answered = False  # whether anything ever was
        self._given_up: str | None = None  # why nothing more is asked
        self._declared: Declared | None = None
        self._named = named  # classes, by the caller, in their order

    def adapters(self, trigger_shape: Sequence[int], value_range: Range, every: bool = True) -> list[Adapter]:
        """The ways that the options and the server's description leave open; unlike a file's, every one costs queries.

        So other scalings are tried only where the options say "any", and other layouts where the description fits them.
        """
        with self._discreet():
            return self._ways(trigger_shape, value_range, every)

    def limit(self, inputs: NDArray[Any]) -> int:
        """How many of these inputs budget, rate and deadline leave room for.

        Raises SuspectError where there is none although nothing has been sent yet.
        """
        if self._given_up is not None:
            return 0
        with self._discreet():
            size = self._fixed(self._input(), inputs) or 1
        left = self._patience.allows()
        room = len(inputs) if left is None else min(len(inputs), left // size * size)
        if not room and not self._patience.sent:
            raise SuspectError(f"a budget of {self._patience.budget} queries is not enough: one trigger takes {size}")
        # The first request need not wait for the rate.
        return min(room, int(max(1.0, min(room, self._patience.in_time()))))

    def query(self, inputs: NDArray[Any], num_classes: int | None = None) -> NDArray[Any]:
        """Scores [N, C], rows of NaN where there was no answer, or labels [N] or [N, R], −1 where there was none.

        `unasked` and `refused` say which rows have no answer, and why. Raises SuspectError where nothing has been
        answered, now or before.
        """
        with self._discreet():
            return self._answers(inputs, num_classes)

    def tensors(self, input_shape: Sequence[int] | None = None) -> list[Tensor]:
        raise SuspectError(f"{self.name} shows no weights; verify a white-box watermark on a file or a module")

    def close(self) -> None:
        self._model.close()

    @contextmanager
    def _discreet(self) -> Iterator[None]:
        """What comes out says nothing secret, though the endpoint may repeat our tokens, and moves no cursor."""
        try:
            yield
        except SuspectError as error:
            raise SuspectError(self._shown(str(error))) from None
        finally:
            self.notes = [self._shown(note) for note in self.notes]
            for reasons in (self.unasked, self.refused):
                reasons.update({row: self._shown(reason) for row, reason in reasons.items()})

    def _shown(self, text: str) -> str:
        return printable(hide(text, self._model.secrets))

    def _ways(self, trigger_shape: Sequence[int], value_range: Range, every: bool) -> list[Adapter]:
        to = self._input()
        shape = () if self._layout else to.shape
        if to.datatype not in _TYPES:
            known = ", ".join(_TYPES)
            raise SuspectError(f"{self.name} takes {to.datatype} and triggers can be {known}: give a datatype it takes")
        kind = _TYPES[to.datatype]
        try:
            ways = adapters(self.name, kind, shape, trigger_shape, value_range, every and self._scaling == "any")
        except SuspectError as error:
            hint = ", or give a layout where the server describes its model wrongly" if shape else ""
            raise SuspectError(f"{error}{hint}") from None
        if not shape:
            ways = [replace(way, layout=self._layout or way.layout) for way in ways if way.layout == "as recorded"]
        if self._scaling != "any" and ways[0].scaling != "bytes":
            ways = [replace(way, scaling=self._scaling) for way in ways]
        others = 0.5 / max(1, len(ways) - 1)
        shares = [1.0] if len(ways) == 1 else [0.5, *[others] * (len(ways) - 1)]
        return [replace(way, share=share) for way, share in zip(ways, shares, strict=True)]

    def _answers(self, inputs: NDArray[Any], num_classes: int | None) -> NDArray[Any]:
        self.notes, self.unasked, self.refused = [], {}, {}
        to = self._input()
        inputs = inputs.astype(DTYPES.get(to.datatype, inputs.dtype), copy=False)
        allowed = self._patience.allows()
        found = self._ask_all(to, inputs[:allowed], num_classes)
        if allowed is not None and allowed < len(inputs) and found.stopped is None:
            found.stopped = f"the budget of {self._patience.budget} queries is used up"
        self._answered |= bool(found.answers)
        if not self._answered:
            reasons = dict.fromkeys(filter(None, (found.trouble, found.stopped)))
            raise SuspectError("; ".join(reasons) or f"{self.name} was asked nothing")
        self.refused, answers = found.refused, found.answers
        missing = (row for row in range(len(inputs)) if row not in answers and row not in self.refused)
        self.unasked = dict.fromkeys(missing, found.stopped or "")
        joined = _joined(answers, len(inputs))
        if found.readings and found.readings[0].kind == "single":
            joined, note = of_two_classes(joined)
            self.notes.append(note)
        # A class that was named has a place of its own; only a bare number may be counted from 0 or from 1.
        return joined[:, None] if self._named and joined.ndim == 1 else joined

    def _input(self) -> Declared:
        """Where triggers go: as the options say, else as the server does, else by default."""
        if self._declared is None:
            name, datatype = self._wanted
            described: list[Declared] = []
            if None in (name, datatype, self._layout):
                try:
                    described = self._patience.call(self._model.inputs, 0)
                except Refused:
                    pass  # it may answer all the same
                except Unavailable as error:
                    if not error.reached:
                        raise
            to = choose_input(self.name, described, name)
            self._declared = replace(to, datatype=datatype or to.datatype)
        return self._declared

    def _ask_all(self, to: Declared, rows: NDArray[Any], num_classes: int | None) -> _Found:
        """Ask for all rows, in their order. A batch that brings no answers is asked again one at a time."""
        order = list(range(len(rows)))
        size = self._batch or self._fixed(to, rows) or CHUNK
        waiting = [order[start : start + size] for start in range(0, len(order), size)]
        found = _Found(stopped=self._given_up)
        failures = 0
        while waiting and found.stopped is None:
            batch = waiting.pop(0)
            try:
                answers = self._ask(to, rows[batch], num_classes, found)
            except Spent as error:
                found.stopped = str(error)
                waiting.insert(0, batch)
            except SuspectError as error:
                failures = failures + 1 if isinstance(error, Unavailable) else 0
                found.trouble = found.trouble or str(error)
                found.refused |= dict.fromkeys(batch, str(error))
                gone = isinstance(error, Unavailable) and not error.reached
                hopeless = isinstance(error, Refused) and error.hopeless and not (self._answered or found.answers)
                if gone or hopeless or failures == FAILURES:
                    found.stopped = self._given_up = str(error)
                elif len(batch) > 1:
                    if not self._batches_work:
                        self._batch = 1
                        batch, waiting = [row for each in (batch, *waiting) for row in each], []
                    waiting[:0] = [[row] for row in batch]
            else:
                failures = 0
                self._batches_work |= len(batch) > 1
                for row, answer in zip(batch, answers, strict=True):
                    found.answers[row] = answer
                    found.refused.pop(row, None)
        for row in (row for batch in waiting for row in batch):
            found.refused.pop(row, None)  # those would have been asked again
        if found.answers and self._batch == 1 and not self._batches_work and size > 1:
            self.notes.append("the suspect answers only one input at a time")
        return found

    def _ask(self, to: Declared, rows: NDArray[Any], num_classes: int | None, found: _Found) -> NDArray[Any]:
        """One request: scores [N, C] or labels [N] of one kind from batch to batch. Raises SuspectError."""
        fixed = self._fixed(to, rows)
        padded = rows if fixed is None else np.resize(rows, (fixed, *rows.shape[1:]))
        outputs = self._patience.call(lambda seconds: self._model.ask(to, padded, seconds), len(padded))
        if self._output is not None:  # some servers send the others too
            outputs = [each for each in outputs if each[0] == self._output]
        readings = found.readings or choose_readings(outputs, len(padded), num_classes, self.name)
        answers = read_all(readings, outputs, len(padded))
        kind = ("", ()) if answers is None else (outputs[readings[0].output][0], answers.shape[1:])
        if answers is None or (found.readings and kind != found.kind):
            raise Refused(f"{self.name} changes the shape of its answers from one batch to the next")
        if not found.readings:
            found.readings, found.kind = readings, kind
            self.notes.extend(describe(readings, outputs))
        return answers[: len(rows)]

    def _fixed(self, to: Declared, inputs: NDArray[Any]) -> int | None:
        """The batch that the server says it takes and no other, unless the options say better."""
        fixed = to.shape[0] if to.shape and not self._overruled else None
        most = MAXIMUM_BATCH_BYTES // max(1, inputs[:1].nbytes)
        if fixed is not None and fixed > most:
            raise SuspectError(f"{self.name} has a fixed batch of {fixed}, and at most {most} can be asked at once")
        return fixed


@dataclass
class _Found:
    """What came back: an answer or a refusal for each row that was asked, and why the asking ended early.

    trouble: what went wrong first, also where it was asked again.
    """

    answers: dict[int, NDArray[Any]] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    stopped: str | None = None
    trouble: str | None = None
    readings: list[Reading] = field(default_factory=list)
    kind: tuple[str, tuple[int, ...]] = ("", ())


def _joined(answers: Mapping[int, NDArray[Any]], rows: int) -> NDArray[Any]:
    """One array for all rows; NaN or −1 where there is no answer."""
    some = next(iter(answers.values()), None)
    if some is None or some.dtype.kind == "i":
        joined: NDArray[Any] = np.full((rows, *(() if some is None else some.shape)), ABSTAINED, np.int64)
    else:
        dtype = np.result_type(*{answer.dtype for answer in answers.values()})
        joined = np.full((rows, *some.shape), np.nan, dtype)
    for row, answer in answers.items():
        joined[row] = answer
    return joined


def _positive(**options: Any) -> None:
    for name, value in options.items():
        whole = name in ("batch", "budget", "tries")
        right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if value is not None and not (right and 0 < value < math.inf):
            raise ValueError(f"{name} must be a {'whole ' if whole else ''}number above 0, and it is {value!r}")
        if value is None and name in ("tries", "timeout", "deadline"):
            raise ValueError(f"{name} must be a number above 0, and it is missing")


def _one_of(name: str, value: str | None, known: Sequence[str | None]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(filter(None, known))}, and it is {value!r}")
