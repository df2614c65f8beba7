"""A served model, whatever it is asked over: the inputs that it declares, and the names of classes in its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wmengine.errors import SuspectError
from wmengine.suspects.answers import ABSTAINED, Outputs
from wmengine.suspects.base import one_line
from wmengine.suspects.endpoint.address import Address
from wmengine.suspects.endpoint.patience import Refused

MAXIMUM_ANSWER = 16 << 20  # bytes, with what frames them
MAXIMUM_DIMENSIONS = 8
_KINDS = {"FP": ("float", (16, 32, 64)), "INT": ("int", (8, 16, 32, 64)), "UINT": ("uint", (8, 16, 32, 64))}
# The protocol's names of types and NumPy's; truth values are no answers.
DTYPES = {f"{name}{bits}": f"{kind}{bits}" for name, (kind, sizes) in _KINDS.items() for bits in sizes}
DTYPES["BYTES"] = "object"


@dataclass(frozen=True)
class Declared:
    """One input of a served model: shape is of the whole batch, None where a size is free, empty where unknown."""

    name: str = "input"
    datatype: str = "FP32"
    shape: tuple[int | None, ...] = ()


class Model(Protocol):
    """One way to talk to a served model: Open Inference Protocol over REST or gRPC, or a template.

    inputs: what the server says that the model takes, nothing where it does not say. ask: the model's outputs for one
    batch. Both take at most so many seconds, and raise Refused or Unavailable with messages that go on after the
    model's name and may repeat secrets, or whatever the reading of a stranger's answer raises.
    """

    address: Address

    def inputs(self, seconds: float) -> list[Declared]: ...

    def ask(self, to: Declared, rows: NDArray[Any], seconds: float) -> Outputs: ...

    def close(self) -> None: ...


def declared(name: Any, datatype: Any, shape: Any) -> Declared:
    """One input as a server describes it; what makes no sense counts as not described."""
    sizes = list(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else []
    known = all(isinstance(size, int) for size in sizes) and len(sizes) <= MAXIMUM_DIMENSIONS
    return Declared(
        name if isinstance(name, str) and name else Declared.name,
        datatype if isinstance(datatype, str) and datatype else Declared.datatype,
        tuple(size if size > 0 else None for size in sizes) if known else (),
    )


def choose_input(name: str, inputs: Sequence[Declared], wanted: str | None) -> Declared:
    """The input that takes the triggers: the one wanted, or the only one. Raises SuspectError where there are more."""
    for each in inputs:
        if each.name == wanted:
            return each
    if len(inputs) > 1:
        names = ", ".join(each.name for each in inputs)
        raise SuspectError(f"{name} needs {len(inputs)} inputs ({names}), and a trigger is one")
    if wanted is not None:
        return Declared(wanted)
    return inputs[0] if inputs else Declared()


def in_numbers(outputs: Outputs, labels: Sequence[str] | None) -> Outputs:
    """Outputs whose texts have become numbers of classes: by their place in `labels`, or where they are numbers.

    A text that names no class is −1, an abstention. Without `labels`, texts without a number are left out. Raises
    Refused where that leaves nothing.
    """
    numbers: Outputs = []
    unknown = None
    for output, array in outputs:
        if array.dtype != object:
            numbers.append((output, array))
            continue
        found = np.array([class_of(each, labels) for each in array.ravel()], np.int64)
        if labels is None and found.size and (found == ABSTAINED).all():
            unknown = array.ravel()[0]
        else:
            numbers.append((output, found.reshape(array.shape)))
    if unknown is not None and not numbers:
        said = one_line(Exception(unknown), 40)
        raise Refused(f"answers with names of classes, such as {said!r}: give their labels, in order")
    return numbers


def class_of(text: Any, labels: Sequence[str] | None) -> int:
    """The class that a name stands for; −1 where it stands for none."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    if not isinstance(text, str):
        return ABSTAINED
    if labels is not None:
        return labels.index(text) if text in labels else ABSTAINED
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else ABSTAINED
