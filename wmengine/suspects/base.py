"""What a suspect is: anything that answers inputs or shows its tensors, and how it is asked.

Black-box verification knows only `query`, white-box verification only `tensors`. Nothing here ever sees the expected
symbols: which batch size or dtype a suspect works with is chosen without them, so the choice is free.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from wmengine.carriers import Tensor
from wmengine.errors import SuspectError, printable
from wmengine.suspects.adapters import Adapter, Range
from wmengine.suspects.answers import Outputs, choose_readings, describe, of_two_classes, read_all

# As fast per input as larger batches, in a tenth of their memory (measured with ONNX Runtime on CPUs).
CHUNK = 32
# A GPU is idle most of the time with so few.
DEVICE_CHUNK = 256

URL_SCHEMES = ("https", "http", "grpcs", "grpc")
# A place in ONNX Runtime's source, which stands before what went wrong there: file, line, the function's signature.
_SOURCE = re.compile(r"/onnxruntime_src/\S+:\d+ .*?\) (?:\[with .*?\] )?")


@runtime_checkable
class Suspect(Protocol):
    """A suspect: its name, its hash (None where it is no file), and notes on what its last call assumed.

    adapters: the ways to put triggers of this shape to it that its declared input leaves open, all of them or (not
    every) the likely ones. query: inputs as an adapter made them [N, ...] → scores float32 or float64 [N, C], or labels
    int64 [N] as the suspect numbers them, or int64 [N, R], the classes that R outputs of scores name; num_classes says
    which outputs answer, where there are several. tensors: its weights in order of execution; input_shape is one
    input's, for suspects that must run to tell that order. All raise SuspectError, one sentence, when the suspect
    cannot answer. close gives back what it holds.
    """

    name: str
    sha256: str | None
    notes: list[str]

    def adapters(self, trigger_shape: Sequence[int], value_range: Range, every: bool = True) -> list[Adapter]: ...

    def query(self, inputs: NDArray[Any], num_classes: int | None = None) -> NDArray[Any]: ...

    def tensors(self, input_shape: Sequence[int] | None = None) -> list[Tensor]: ...

    def close(self) -> None: ...


@runtime_checkable
class Rationed(Protocol):
    """A suspect that may not be asked everything, as it is a stranger's service.

    limit: how many of these inputs, the first ones, there is room for; unasked and refused: rows of the last query that
    were never put to it, or that brought no readable answer in all tries, and why. They read as abstentions there.
    """

    unasked: Mapping[int, str]
    refused: Mapping[int, str]

    def limit(self, inputs: NDArray[Any]) -> int: ...


def is_url(suspect: Any) -> bool:
    """Whether this is the address of an endpoint."""
    return isinstance(suspect, str) and suspect.lower().startswith(tuple(f"{scheme}://" for scheme in URL_SCHEMES))


def one_line(error: BaseException, limit: int = 200) -> str:
    """The first lines of a library's message, as part of a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    if text.startswith("[ONNXRuntimeError]"):  # "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model failed"
        text = text.split(" : ", 3)[-1]
    text = printable(_SOURCE.sub("", text))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def ask_in_chunks(
    run: Callable[[NDArray[Any]], Outputs],
    inputs: NDArray[Any],
    num_classes: int | None,
    name: str,
    notes: list[str],
    fixed_batch: int | None = None,
    chunk: int = CHUNK,
) -> NDArray[Any]:
    """Ask `run` for all inputs, a chunk at a time, and join the answers of one output.

    A fixed batch is honoured by padding the last chunk with its first rows. A suspect that fails on its first chunk is
    asked one input at a time instead (a batch of 1 is baked into many exports), and `notes` say so.
    """
    chunk = fixed_batch or chunk
    try:
        first = run(_padded(inputs[:chunk], fixed_batch))
    except SuspectError:
        if fixed_batch is not None or len(inputs) == 1:
            raise
        fixed_batch = chunk = 1
        first = run(inputs[:1])
        notes.append("the suspect answers only one input at a time")
    readings = choose_readings(first, min(chunk, len(inputs)) if fixed_batch is None else chunk, num_classes, name)
    notes.extend(describe(readings, first))
    parts: list[NDArray[Any]] = []
    for start in range(0, len(inputs), chunk):
        rows = inputs[start : start + chunk]
        outputs = first if start == 0 else run(_padded(rows, fixed_batch))
        answer = read_all(readings, outputs, fixed_batch or len(rows))
        if answer is None or (parts and answer.shape[1:] != parts[0].shape[1:]):
            raise SuspectError(f"{name} changes the shape of its answers from one batch to the next")
        parts.append(answer[: len(rows)])
    answers = np.concatenate(parts)
    if readings[0].kind == "single":
        answers, note = of_two_classes(answers)
        notes.append(note)
    return answers


def _padded(rows: NDArray[Any], batch: int | None) -> NDArray[Any]:
    if batch is None or len(rows) == batch:
        return rows
    return np.resize(rows, (batch, *rows.shape[1:]))


def check_input_shape(name: str, expected: Sequence[int | None], inputs: NDArray[Any]) -> None:
    """Raises SuspectError naming both shapes unless inputs [N, ...] fit `expected`, where None is any length."""
    asked = inputs.shape[1:]
    fits = len(asked) == len(expected) - 1 and all(
        size is None or size == have for size, have in zip(expected[1:], asked, strict=True)
    )
    if not fits:
        takes = ["N", *("any" if size is None else str(size) for size in expected[1:])]
        raise SuspectError(
            f"{name} takes inputs [{', '.join(takes)}] and the watermark's triggers are "
            f"[{', '.join(['N', *map(str, asked)])}]; verify a suspect of the same input shape"
        )
