"""What a suspect is: anything that answers inputs or shows its tensors, and how its answers are read.

Black-box verification knows only `query`, white-box verification only `tensors`. Nothing here ever sees the expected
symbols: which output, batch size or dtype a suspect works with is chosen from shapes alone, so the choice is free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from wmengine.carriers import Tensor
from wmengine.errors import SuspectError
from wmengine.suspects.adapters import Adapter, Range

# As fast per input as larger batches, in a tenth of their memory (measured with ONNX Runtime on CPUs).
CHUNK = 32

URL_SCHEMES = ("https", "http", "grpcs", "grpc")

Outputs = list[tuple[str, Any]]


@runtime_checkable
class Suspect(Protocol):
    """A suspect: its name, its hash (None where it is no file), and notes on what its last call assumed.

    adapters: the ways to put triggers of this shape to it that its declared input leaves open, all of them or (not
    every) the likely ones. query: inputs as an
    adapter made them [N, ...] → scores float32 or float64 [N, C], or labels int64 [N]; num_classes says which output
    answers, where there are several. tensors: its weights in order of execution; input_shape is one input's, for
    suspects that must run to tell that order. All raise SuspectError, one sentence, when the suspect cannot answer.
    close gives back what it holds.
    """

    name: str
    sha256: str | None
    notes: list[str]

    def adapters(self, trigger_shape: Sequence[int], value_range: Range, every: bool = True) -> list[Adapter]: ...

    def query(self, inputs: NDArray[Any], num_classes: int | None = None) -> NDArray[Any]: ...

    def tensors(self, input_shape: Sequence[int] | None = None) -> list[Tensor]: ...

    def close(self) -> None: ...


def is_url(suspect: Any) -> bool:
    """Whether this is the address of an endpoint."""
    return isinstance(suspect, str) and suspect.startswith(tuple(f"{scheme}://" for scheme in URL_SCHEMES))


def one_line(error: BaseException, limit: int = 200) -> str:
    """The first lines of a library's message, as part of a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    if text.startswith("[ONNXRuntimeError]"):  # "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model failed"
        text = text.split(" : ", 3)[-1]
    return text if len(text) <= limit else text[: limit - 1] + "…"


def to_array(output: Any) -> NDArray[Any] | None:
    """A NumPy array of what a suspect returned (array, torch tensor, nested list); None if it is none of these."""
    try:
        if hasattr(output, "detach"):
            tensor = output.detach().cpu()
            narrow = tensor.is_floating_point() and tensor.element_size() < 4  # NumPy has no bfloat16
            return np.asarray((tensor.float() if narrow else tensor).numpy())
        return np.asarray(output)
    except Exception:  # a sparse, quantised or meta tensor, or whatever the suspect's own classes raise
        return None


def read_answers(output: Any, rows: int) -> NDArray[Any] | None:
    """Scores [rows, C] or labels int64 [rows] in one output, or None if it holds neither.

    Scores are float32, or float64 where they came in more than float32 holds: rounding must not move an argmax. Axes of
    length 1 at the end are dropped ([N, C, 1, 1] is [N, C]); integers [N] and [N, 1] are labels.
    """
    array = to_array(output)
    if array is None or array.ndim == 0 or array.shape[0] != rows or array.dtype.kind not in "fiu":
        return None
    while array.ndim > 2 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.dtype.kind in "iu" and (array.ndim == 1 or array.shape[1:] == (1,)):
        return array.reshape(rows).astype(np.int64)
    if array.ndim != 2:
        return None
    with np.errstate(over="ignore"):
        return array.astype(np.float32 if array.dtype in (np.float16, np.float32) else np.float64)


def choose_output(outputs: Outputs, rows: int, num_classes: int | None, name: str) -> int:
    """Which output answers: the first with scores of num_classes (any number if None), else the first with labels.

    Raises SuspectError naming both numbers of classes, or the outputs' shapes where none can be read.
    """
    answers = [read_answers(output, rows) for _, output in outputs]
    scores = [index for index, answer in enumerate(answers) if answer is not None and answer.ndim == 2]
    for index in scores:
        answer = answers[index]
        if answer is not None and num_classes in (None, answer.shape[1]):
            return index
    for index, answer in enumerate(answers):
        if answer is not None and answer.ndim == 1:
            return index
    if scores:
        classes = sorted({answer.shape[1] for answer in answers if answer is not None})
        raise SuspectError(
            f"{name} answers with {' or '.join(map(str, classes))} classes and the watermark has {num_classes}; "
            "verify a suspect of the same task"
        )
    shapes = ", ".join(f"{label} {_shape_of(output)}" for label, output in outputs) or "none"
    raise SuspectError(f"{name} answers {rows} inputs with no scores [{rows}, C] and no labels [{rows}], but {shapes}")


def _shape_of(output: Any) -> str:
    array = None if isinstance(output, list) else to_array(output)
    return type(output).__name__ if array is None else str(list(array.shape))


def ask_in_chunks(
    run: Callable[[NDArray[Any]], Outputs],
    inputs: NDArray[Any],
    num_classes: int | None,
    name: str,
    notes: list[str],
    fixed_batch: int | None = None,
) -> NDArray[Any]:
    """Ask `run` for all inputs, a chunk at a time, and join the answers of one output.

    A fixed batch is honoured by padding the last chunk with its first rows. A suspect that fails on its first chunk is
    asked one input at a time instead (a batch of 1 is baked into many exports), and `notes` say so.
    """
    chunk = fixed_batch or CHUNK
    try:
        first = run(_padded(inputs[:chunk], fixed_batch))
    except SuspectError:
        if fixed_batch is not None or len(inputs) == 1:
            raise
        fixed_batch = chunk = 1
        first = run(inputs[:1])
        notes.append("the suspect answers only one input at a time")
    chosen = choose_output(first, min(chunk, len(inputs)) if fixed_batch is None else chunk, num_classes, name)
    if len(first) > 1:
        notes.append(f"answers were read from output {first[chosen][0]!r}, one of {len(first)}")
    parts: list[NDArray[Any]] = []
    for start in range(0, len(inputs), chunk):
        rows = inputs[start : start + chunk]
        outputs = first if start == 0 else run(_padded(rows, fixed_batch))
        answer = read_answers(outputs[chosen][1], fixed_batch or len(rows)) if chosen < len(outputs) else None
        if answer is None or (parts and answer.shape[1:] != parts[0].shape[1:]):
            raise SuspectError(f"{name} changes the shape of its answers from one batch to the next")
        parts.append(answer[: len(rows)])
    return np.concatenate(parts)


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
