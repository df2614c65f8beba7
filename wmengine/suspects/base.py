"""What a suspect is: anything that answers inputs or shows its tensors, and how it is asked.

Black-box verification knows only `answer`, white-box verification only `tensors` and `activations`. Nothing here ever
sees the expected symbols: which batch size or dtype a suspect works with is chosen without them, so the choice is free.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from wmengine.errors import SuspectError, printable
from wmengine.facts import Fact, fact
from wmengine.suspects.adapters import Adapter, Range
from wmengine.suspects.answers import ABSTAINED, Outputs, choose_readings, describe, of_two_classes, read_all

# As fast per input as larger batches, in a tenth of their memory (measured with ONNX Runtime on CPUs).
CHUNK = 32
# A GPU is idle most of the time with so few.
DEVICE_CHUNK = 256

URL_SCHEMES = ("https", "http", "grpcs", "grpc")
# A place in ONNX Runtime's source, which stands before what went wrong there: file, line, the function's signature.
_SOURCE = re.compile(r"/onnxruntime_src/\S+:\d+ .*?\) (?:\[with .*?\] )?")

Inputs = Mapping[str, NDArray[Any]]  # by name, each [N, ...]


@dataclass(frozen=True)
class InputSpec:
    """One input of a model without its batch axis; dtype as NumPy names it."""

    shape: tuple[int, ...]
    dtype: str


Signature = Mapping[str, InputSpec]


Weight = tuple[NDArray[np.float32], NDArray[np.float32] | None]


class Tensor:
    """One weight of a suspect: its shape [O, I/groups, *kernel], O filters, and its name there, only for notes.

    `read` gives its values, float32 of that shape, and what the normalisation behind it multiplies its filters by,
    float32 [O], or None where there is none. A large file's weights are not all held: each is read anew every time.
    by_name: its place when names are sorted, numbers in them by their size; None where the order is that of execution.
    """

    by_name: int | None = None

    def __init__(self, values: NDArray[np.float32], source: str, factors: NDArray[np.float32] | None = None) -> None:
        self.shape: tuple[int, ...] = values.shape
        self.source = source
        self.read: Callable[[], Weight] = lambda: (values, factors)

    @classmethod
    def unread(
        cls, shape: tuple[int, ...], source: str, read: Callable[[], Weight], by_name: int | None = None
    ) -> Tensor:
        """One that `read` reads when it is asked for."""
        tensor = cls.__new__(cls)
        tensor.shape, tensor.source, tensor.read, tensor.by_name = shape, source, read, by_name
        return tensor

    @property
    def values(self) -> NDArray[np.float32]:
        return self.read()[0]

    @property
    def factors(self) -> NDArray[np.float32] | None:
        return self.read()[1]


@dataclass(frozen=True, eq=False)
class Answers:
    """What a suspect answered N inputs with.

    kind "scores": values float [N, C]; "labels": int64 [N], as the suspect numbers them; "classes": int64 [N, R], the
    classes that R outputs of scores name. Rows without an answer hold NaN or ABSTAINED: `unasked` were never put to it,
    `refused` brought no readable answer, and both say why. names: what the suspect calls its classes, in its order.
    """

    kind: Literal["scores", "labels", "classes"]
    values: NDArray[Any]
    unasked: Mapping[int, str] = field(default_factory=dict)
    refused: Mapping[int, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)


@runtime_checkable
class Suspect(Protocol):
    """A suspect: its name, its hash (None where it is no file), and facts on what its last call assumed.

    settings: how it is asked, where its caller chose that; empty for a file. adapters: the ways to put images of this
    shape to it that its declared input leaves open, all of them or (not every) the likely ones. answer: inputs by the
    names that the mark has for them; num_classes says which outputs answer, where there are several. limit: how many of
    `count` inputs like these, the first ones, there is room for. tensors: its weights in order of execution; signature
    is the inputs', for suspects that must run to tell that order. activations: float32 [N, F], what goes into the
    weight at `place` in that order. All raise SuspectError, one sentence, when the suspect cannot do it. close gives
    back what it holds.
    """

    name: str
    sha256: str | None
    facts: list[Fact]
    settings: Mapping[str, Any]

    def adapters(self, shape: Sequence[int], value_range: Range, every: bool = True) -> list[Adapter]: ...

    def answer(self, inputs: Inputs, num_classes: int | None = None) -> Answers: ...

    def limit(self, inputs: Inputs, count: int) -> int: ...

    def tensors(self, signature: Signature | None = None) -> list[Tensor]: ...

    def activations(self, place: int, inputs: Inputs) -> NDArray[np.float32]: ...

    def close(self) -> None: ...


def rows_of(inputs: Inputs) -> int:
    """N of inputs [N, ...] by name."""
    return len(next(iter(inputs.values())))


def part_of(inputs: Inputs, start: int, stop: int) -> dict[str, NDArray[Any]]:
    """Rows start … stop of every input."""
    return {name: rows[start:stop] for name, rows in inputs.items()}


def digest_of(settings: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal digits, of settings as canonical JSON: sorted, without spaces, ASCII."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def is_url(suspect: Any) -> bool:
    """Whether this is the address of an endpoint."""
    return isinstance(suspect, str) and suspect.lower().startswith(tuple(f"{scheme}://" for scheme in URL_SCHEMES))


def one_line(error: BaseException, limit: int = 200) -> str:
    """The first lines of a library's message, as part of a sentence."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # a stranger's own class of error
        text = ""
    text = text or type(error).__name__
    if text.startswith("[ONNXRuntimeError]"):  # "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model failed"
        text = text.split(" : ", 3)[-1]
    text = printable(_SOURCE.sub("", text))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def ask_in_chunks(
    run: Callable[[dict[str, NDArray[Any]]], Outputs],
    inputs: Inputs,
    num_classes: int | None,
    name: str,
    facts: list[Fact],
    fixed_batch: int | None = None,
    chunk: int = CHUNK,
) -> Answers:
    """Ask `run` for all inputs, a chunk at a time, and join the answers of one output.

    A fixed batch is honoured by padding the last chunk with its first rows. A suspect that fails on its first chunk is
    asked one input at a time instead (a batch of 1 is baked into many exports), and `facts` say so.
    """
    count, chunk = rows_of(inputs), fixed_batch or chunk
    try:
        first = run(padded(part_of(inputs, 0, chunk), fixed_batch))
    except SuspectError:
        if fixed_batch is not None or count == 1:
            raise
        fixed_batch = chunk = 1
        first = run(part_of(inputs, 0, 1))
        facts.append(fact("one_at_a_time"))
    readings = choose_readings(first, min(chunk, count) if fixed_batch is None else chunk, num_classes, name)
    facts.extend(describe(readings, first))
    parts: list[NDArray[Any]] = []
    for start in range(0, count, chunk):
        size = min(chunk, count - start)
        outputs = first if start == 0 else run(padded(part_of(inputs, start, start + chunk), fixed_batch))
        answer = read_all(readings, outputs, fixed_batch or size)
        if answer is None or (parts and answer.shape[1:] != parts[0].shape[1:]):
            raise SuspectError(f"{name} changes the shape of its answers from one batch to the next")
        parts.append(answer[:size])
    answers = np.concatenate(parts)
    if readings[0].kind == "single":
        answers, note = of_two_classes(answers)
        facts.append(note)
    return tagged(answers)


def tagged(
    values: NDArray[Any], unasked: Mapping[int, str] | None = None, refused: Mapping[int, str] | None = None
) -> Answers:
    """Answers by their type: labels [N], classes [N, R] of integers, or scores [N, C]."""
    missing = unasked or {}, refused or {}
    if values.ndim == 1:
        return Answers("labels", _or_none(values), *missing)
    if values.dtype.kind == "i":
        return Answers("classes", _or_none(values), *missing)
    return Answers("scores", values, *missing)


def _or_none(labels: NDArray[Any]) -> NDArray[np.int64]:
    return np.where(labels >= 0, labels, ABSTAINED).astype(np.int64)


def padded(inputs: dict[str, NDArray[Any]], batch: int | None) -> dict[str, NDArray[Any]]:
    """Inputs repeated up to a fixed batch."""
    if batch is None or rows_of(inputs) == batch:
        return inputs
    return {name: np.resize(rows, (batch, *rows.shape[1:])) for name, rows in inputs.items()}
