"""A suspect behind a network address: asked a budgeted number of inputs, politely.

What goes out is inputs, never labels. What an endpoint refuses or answers unreadably matches nothing and is noted; so
is what the budget or the time did not allow, and a miss can never convict anybody. Only where nothing at all is
answered, the suspect cannot be judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from wmengine.errors import SuspectError, printable
from wmengine.facts import Fact, fact
from wmengine.suspects.adapters import Adapter, Range, adapters, rows_as
from wmengine.suspects.answers import ABSTAINED, Outputs, Reading, choose_readings, describe, of_two_classes, read_all
from wmengine.suspects.base import CHUNK, Answers, Inputs, Signature, Tensor, one_line, tagged
from wmengine.suspects.class_names import check_enough
from wmengine.suspects.endpoint.grpc import GrpcModel
from wmengine.suspects.endpoint.model import DTYPES, Declared, Model, choose_input, in_numbers
from wmengine.suspects.endpoint.options import DATATYPES, EndpointOptions
from wmengine.suspects.endpoint.patience import Patience, Refused, Spent, Unavailable
from wmengine.suspects.endpoint.rest import RestModel, TemplateModel

Answer = TypeVar("Answer")

# What a server may make of a request by declaring a fixed batch: JSON takes ten times as much memory.
MAXIMUM_BATCH_BYTES = 64 << 20
# So many requests in a row that failed in all their tries end the asking.
FAILURES = 3


def endpoint(url: str, **options: Any) -> EndpointSuspect:
    """A suspect that answers over the network, to hand to `verify`; the options are those of EndpointOptions.

        suspect = endpoint("https://host/v2/models/detector", layout="channels last", budget=200, rate=5)
        verdict = verify(suspect, "acme-adi.wm")

    Raises ValueError for a URL, a template or an option's value that is none, and TypeError for an option that is none.
    Nothing is sent before the suspect is asked.
    """
    return EndpointSuspect(EndpointOptions(url, **options))


class EndpointSuspect:
    """A suspect of the usual kind, asked as its options say. Budget and deadline are for its whole life.

    settings: the options, without secrets, and `digest`, their SHA-256 (EndpointOptions).
    """

    def __init__(self, options: EndpointOptions, model: Model | None = None, patience: Patience | None = None) -> None:
        """model and patience: those that the options name, unless others are given."""
        self._options = options
        self._model = _model(options) if model is None else model
        self._patience = patience or Patience(
            options.rate, options.budget, options.tries, options.timeout, options.deadline
        )
        self.name = self._model.address.name
        self.sha256: str | None = None
        self.settings: Mapping[str, Any] = {**options.settings, "digest": options.digest()}
        self.facts: list[Fact] = []
        self._batches_work = False  # whether more than one input at once was ever answered
        self._one_at_a_time = False  # as nothing else was ever answered
        self._answered = False  # whether anything ever was
        self._given_up: str | None = None  # why nothing more is asked
        self._declared: Declared | None = None

    def adapters(self, shape: Sequence[int], value_range: Range, every: bool = True) -> list[Adapter]:
        """The ways that the options and the server's description leave open; unlike a file's, every one costs queries.

        So other scalings are tried only where the options say "any", and other layouts where the description fits them.
        """
        with self._discreet():
            return self._ways(shape, value_range, every)

    def limit(self, inputs: Inputs, count: int) -> int:
        """How many of `count` inputs like these budget, rate and deadline leave room for.

        Raises SuspectError where there is none although nothing has been sent yet.
        """
        rows = self._only(inputs)
        if self._given_up is not None:
            return 0
        with self._discreet():
            size = self._fixed(self._input(), rows) or 1
        left = self._patience.allows()
        room = count if left is None else min(count, left // size * size)
        if not room and not self._patience.sent:
            raise SuspectError(f"a budget of {self._patience.budget} queries is not enough: one trigger takes {size}")
        # The first request need not wait for the rate.
        return int(min(room, max(1.0, self._patience.in_time())))

    def answer(self, inputs: Inputs, num_classes: int | None = None) -> Answers:
        """Raises SuspectError where nothing has been answered, now or before."""
        rows = self._only(inputs)
        check_enough(self._options.labels, num_classes)
        with self._discreet():
            self.facts = []
            to, allowed = self._input(), self._patience.allows()
            found = self._ask_all(
                to, self._laid_out(rows[:allowed]).astype(DTYPES[to.datatype], copy=False), num_classes
            )
            if allowed is not None and allowed < len(rows):
                found.stopped = found.stopped or f"the budget of {self._patience.budget} queries is used up"
            return self._answers(found, len(rows))

    def tensors(self, signature: Signature | None = None) -> list[Tensor]:
        raise SuspectError(f"{self.name} shows no weights; verify a white-box watermark on a file or a module")

    def activations(self, place: int, inputs: Inputs) -> NDArray[np.float32]:
        raise SuspectError(f"{self.name} shows no activations; verify a white-box watermark on a file or a module")

    def close(self) -> None:
        self._model.close()

    def _only(self, inputs: Inputs) -> NDArray[Any]:
        if len(inputs) != 1:
            raise SuspectError(f"{self.name} is asked with one input, and the watermark has {', '.join(inputs)}")
        (rows,) = inputs.values()
        return rows

    def _answers(self, found: _Found, rows: int) -> Answers:
        """What came back, and why the other rows have no answer."""
        self._answered |= bool(found.answers)
        if not self._answered:
            reasons = dict.fromkeys(filter(None, (found.trouble, found.stopped)))
            raise SuspectError("; ".join(reasons) or f"{self.name} was asked nothing")
        missing = (row for row in range(rows) if row not in found.answers and row not in found.refused)
        unasked = dict.fromkeys(missing, self._shown(found.stopped or ""))
        some = [*found.answers.values()] or [np.array(ABSTAINED)]
        dtype = np.result_type(*{answer.dtype for answer in some})
        joined = np.full((rows, *some[0].shape), ABSTAINED if dtype.kind == "i" else np.nan, dtype)
        for row, answer in found.answers.items():
            joined[row] = answer
        if found.readings and found.readings[0].kind == "single":
            joined, note = of_two_classes(joined)
            self.facts.append(note)
        # A class that was named has a place of its own; only a bare number may be counted from 0 or from 1.
        if self._options.labels is not None and joined.ndim == 1:
            joined = joined[:, None]
        refused = {row: self._shown(reason) for row, reason in found.refused.items()}
        return tagged(joined, unasked, refused)

    @contextmanager
    def _discreet(self) -> Iterator[None]:
        """What goes wrong says nothing secret, though the endpoint may repeat our tokens, and moves no cursor."""
        try:
            yield
        except SuspectError as error:
            raise SuspectError(self._shown(str(error))) from None

    def _shown(self, text: str) -> str:
        return printable(self._model.address.hide(text))

    def _ways(self, trigger_shape: Sequence[int], value_range: Range, every: bool) -> list[Adapter]:
        to, layout, scaling = self._input(), self._options.layout, self._options.scaling
        shape = self._declared_shape()
        try:
            kind = DATATYPES[to.datatype]
            ways = adapters(self.name, kind, shape, trigger_shape, value_range, every and scaling == "any")
        except SuspectError as error:
            hint = ", or give a layout where the server describes its model wrongly" if shape else ""
            raise SuspectError(f"{error}{hint}") from None
        if not shape:
            ways = [way._replace(layout=layout or way.layout) for way in ways if way.layout == "as recorded"]
        if scaling != "any" and ways[0].scaling != "bytes":
            ways = [way._replace(scaling=scaling) for way in ways]
        shares = [1.0] if len(ways) == 1 else [0.5, *[0.5 / (len(ways) - 1)] * (len(ways) - 1)]
        return [way._replace(share=share) for way, share in zip(ways, shares, strict=True)]

    def _declared_shape(self) -> tuple[int | None, ...]:
        """What the server says that it takes, any number of it; nothing where the options say better."""
        shape = self._input().shape
        return (None, *shape[1:]) if shape and self._options.layout is None else ()

    def _laid_out(self, rows: NDArray[Any]) -> NDArray[Any]:
        """With the axes of length 1 that the server has."""
        row = rows_as(self._declared_shape(), rows.shape[1:])
        return rows if row is None else rows.reshape(len(rows), *row)

    def _input(self) -> Declared:
        """Where triggers go: as the options say, else as the server does, else by default."""
        if self._declared is None:
            name, datatype = self._options.input, self._options.datatype
            described: list[Declared] = []
            if None in (name, datatype, self._options.layout):
                try:
                    described = self._call(self._model.inputs, 0)
                except Refused:
                    pass  # it may answer all the same
                except Unavailable as error:
                    if not error.reached:
                        raise
            to = choose_input(self.name, described, name)
            to = replace(to, datatype=datatype or to.datatype)
            if to.datatype not in DATATYPES:
                known = ", ".join(DATATYPES)
                said = f"{self.name} takes {to.datatype} and triggers can be {known}: give a datatype it takes"
                raise SuspectError(said)
            self._declared = to
        return self._declared

    def _ask_all(self, to: Declared, rows: NDArray[Any], num_classes: int | None) -> _Found:
        """Ask for all rows, in their order. A batch that brings no answers is asked again one at a time."""
        size = 1 if self._one_at_a_time else self._options.batch or self._fixed(to, rows) or CHUNK
        waiting = [[*range(start, min(start + size, len(rows)))] for start in range(0, len(rows), size)]
        found = _Found(stopped=self._given_up)
        failures = 0
        while waiting and found.stopped is None:
            batch = waiting.pop(0)
            if self._one_at_a_time and len(batch) > 1:
                waiting[:0] = [[row] for row in batch]
                continue
            try:
                answers = self._ask(to, rows[batch], num_classes, found)
            except Spent as error:
                found.stopped = str(error)
            except SuspectError as error:
                failures = failures + 1 if isinstance(error, Unavailable) else 0
                found.trouble = found.trouble or str(error)
                gone = isinstance(error, Unavailable) and not error.reached
                hopeless = isinstance(error, Refused) and error.hopeless and not (self._answered or found.answers)
                if gone or hopeless or failures == FAILURES:
                    found.stopped = self._given_up = str(error)
                if len(batch) == 1 or found.stopped:
                    found.refused |= dict.fromkeys(batch, str(error))
                else:
                    self._one_at_a_time = not self._batches_work
                    waiting[:0] = [[row] for row in batch]
            else:
                failures = 0
                self._batches_work |= len(batch) > 1
                found.answers |= zip(batch, answers, strict=True)
        if found.answers and self._one_at_a_time and size > 1:
            self.facts.append(fact("one_at_a_time"))
        return found

    def _ask(self, to: Declared, rows: NDArray[Any], num_classes: int | None, found: _Found) -> NDArray[Any]:
        """One request: scores [N, C] or labels [N] of one kind from batch to batch. Raises SuspectError."""
        fixed = self._fixed(to, rows)
        padded = rows if fixed is None else np.resize(rows, (fixed, *rows.shape[1:]))
        answers = self._call(
            lambda seconds: self._read(self._model.ask(to, padded, seconds), len(padded), num_classes, found),
            len(padded),
        )
        return answers[: len(rows)]

    def _read(self, outputs: Outputs, rows: int, num_classes: int | None, found: _Found) -> NDArray[Any]:
        if self._options.output is not None:  # some servers send the others too
            outputs = [each for each in outputs if each[0] == self._options.output]
        outputs = in_numbers(outputs, self._options.labels)
        readings = found.readings or choose_readings(outputs, rows, num_classes, self.name)
        answers = read_all(readings, outputs, rows)
        kind = ("", ()) if answers is None else (outputs[readings[0].output][0], answers.shape[1:])
        if answers is None or (found.readings and kind != found.kind):
            raise Refused("changes the shape of its answers from one batch to the next")
        if answers.shape[1:] == (0,):
            raise Refused("answers with scores of no class")
        if not found.readings:
            self.facts.extend(describe(readings, [(self._shown(name), value) for name, value in outputs]))
            found.readings, found.kind = readings, kind
        return answers

    def _call(self, ask: Callable[[float], Answer], inputs: int) -> Answer:
        """What a patient asking brings; whatever a stranger's bytes do to who reads them is a Refused."""

        def attempt(seconds: float) -> Answer:
            try:
                return ask(seconds)
            except (Refused, Unavailable) as error:
                error.args = (f"{self.name} {error}",)
                raise
            except SuspectError:
                raise
            except Exception as error:
                said = f"{type(error).__name__}: {one_line(error, 80)}"
                raise Refused(f"{self.name} answers what cannot be read ({said})") from None

        return self._patience.call(attempt, inputs)

    def _fixed(self, to: Declared, inputs: NDArray[Any]) -> int | None:
        """The batch that the server says it takes and no other, unless the options say better."""
        fixed = to.shape[0] if to.shape and self._options.batch is None else None
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


def _model(options: EndpointOptions) -> Model:
    if options.template is not None:
        return TemplateModel(options, options.template)
    return GrpcModel(options) if options.url.lower().startswith("grpc") else RestModel(options)
