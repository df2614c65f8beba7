"""A mark's inputs as a file takes them: under its names, in its types and axes, with what it needs beside them.

Nothing here is tried: which input takes which, and what fills the others, follows from what the file declares, so it is
free. Where that leaves a choice it is the caller's, by `inputs=`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.errors import OtherTask, SuspectError
from wmengine.facts import Fact, fact
from wmengine.suspects.adapters import BYTES, FLOATS, layouts_of, other_shape, rows_as, without_batch
from wmengine.suspects.base import Inputs, rows_of
from wmengine.suspects.devices import BFLOAT16
from wmengine.suspects.onnx_engine import Input

MAXIMUM_BATCH, MAXIMUM_BATCH_BYTES = 4096, 256 << 20
DTYPES = FLOATS | BYTES | {"tensor(bool)": "bool"}
DTYPES |= {f"tensor({name})": name for name in ("int16", "uint16", "uint32", "uint64")}
# What a name says of an input that every model of its kind has; anything else is told from type and axes.
_MASK, _ZERO, _PLACES = ("mask",), ("token_type", "segment"), ("position",)
_SHOWN = 8  # inputs that a sentence names


@dataclass(frozen=True)
class Given:
    """What a file is run on. rows: by name, [N, ...]; filled: the inputs that are the same whatever the rows are, and
    their value, None for places 0, 1, 2 …; batch: the only one that it takes; bare: the inputs without a batch axis."""

    name: str
    rows: dict[str, NDArray[Any]]
    filled: list[tuple[Input, float | None]]
    batch: int | None
    bare: frozenset[str]

    def feeds(self, rows: Inputs) -> dict[str, NDArray[Any]]:
        """Some of the rows, as many as a batch has, and the other inputs beside them. Raises SuspectError where these
        are too large, or no numbers."""
        count, like = rows_of(rows), next(iter(rows.values())).shape
        put = {name: values[0] if name in self.bare else values for name, values in rows.items()}
        left = MAXIMUM_BATCH_BYTES
        for each, value in self.filled:
            if each.type not in DTYPES:
                raise SuspectError(f"{self.name} takes {each.type} for {each.name!r}, and the watermark has none")
            shape, dtype = _shape(each, count, like), np.dtype(DTYPES[each.type])
            left -= math.prod(shape) * dtype.itemsize
            if left < 0:
                raise SuspectError(f"{self.name} takes {shape} for {each.name!r}, above {MAXIMUM_BATCH_BYTES} bytes")
            put[each.name] = np.full(shape, 0.0 if value is None else value, dtype)
            if value is None:
                put[each.name] += np.arange(shape[-1] if shape else 1, dtype=dtype)
        return put


def single_input(name: str, declared: Sequence[Input], shape: Sequence[int], values: Mapping[str, float]) -> Input:
    """The input that takes rows of this shape, or all of them as one where each takes a column.

    values: of inputs by name, which take no rows. Raises OtherTask where none does, SuspectError where several do.
    """
    left = [each for each in declared if each.name not in values]
    if len(left) == 1:
        return left[0]
    if _are_columns(left, shape):
        return Input(left[0].name, _type_of_columns(left), (left[0].shape[0] if left[0].shape else None, len(left)))
    fits = [each for each in left if each.type in FLOATS | BYTES and layouts_of(each.shape, shape)]
    likely = [each for each in fits if each.shape and not _is_named(each, (*_MASK, *_ZERO, *_PLACES))] or fits
    if len(likely) != 1:
        raise _unclear(name, left, likely, 1)
    return likely[0]


def given(
    name: str, declared: Sequence[Input], inputs: Inputs, values: Mapping[str, float], facts: list[Fact]
) -> Given:
    """Inputs [N, ...] by a mark's names, as a file takes them. Raises SuspectError where it does not.

    The same names go together, or as many in the same order. A mark's inputs of ones that the file does not have, as
    the masks of triggers that fill their sequence, are left out.
    """
    taken = _taken(name, [each for each in declared if each.name not in values], inputs)
    rows, bare, batch = {}, set[str](), None
    for entry, have in taken:
        cast = _cast(name, entry, have, facts)
        row = rows_as(entry.shape, have.shape[1:])
        if row is None:
            raise other_shape(name, entry.shape, have.shape[1:])
        if entry.shape and without_batch(entry.shape, row):
            bare.add(entry.name)
            batch = 1
        elif entry.shape:
            batch = batch or entry.shape[0]
        rows[entry.name] = cast.reshape(len(have), *row)
    if batch is not None:
        most = max(1, sum(have[:1].nbytes for have in rows.values()))
        most = min(MAXIMUM_BATCH, MAXIMUM_BATCH_BYTES // most)
        if batch > most:
            raise SuspectError(f"{name} has a fixed batch of {batch}, and at most {most} can be asked at once")
        facts.append(fact("fixed_batch", batch=batch))
    filled = [(each, values.get(each.name, _usual(each))) for each in declared if each.name not in rows]
    if filled:
        said = [f"{each.name[:100]} = {'0, 1, 2 …' if value is None else f'{value:g}'}" for each, value in filled]
        facts.append(fact("filled", inputs=", ".join(said[:_SHOWN]), count=len(said)))
    return Given(name, rows, filled, batch, frozenset(bare))


def _taken(name: str, declared: Sequence[Input], inputs: Inputs) -> list[tuple[Input, NDArray[Any]]]:
    """Which of the inputs declared take rows, and which."""
    if len(declared) == len(inputs) == 1:
        return [*zip(declared, inputs.values(), strict=True)]
    by_name = {each.name: each for each in declared}
    if inputs.keys() <= by_name.keys():
        return [(by_name[each], rows) for each, rows in inputs.items()]
    if len(declared) < len(inputs):
        inputs = {each: rows for each, rows in inputs.items() if not (rows == 1).all()}
        if inputs.keys() <= by_name.keys():
            return [(by_name[each], rows) for each, rows in inputs.items()]
    if len(declared) == len(inputs):
        return _in_order(declared, inputs)
    if len(inputs) != 1:
        raise _unclear(name, declared, [], len(inputs))
    (rows,) = inputs.values()
    shape = rows.shape[1:]
    if _are_columns(declared, shape):
        columns = rows.reshape(len(rows), -1)
        return [(each, columns[:, place]) for place, each in enumerate(declared)]
    return [(single_input(name, declared, shape, {}), rows)]


def _in_order(declared: Sequence[Input], inputs: Inputs) -> list[tuple[Input, NDArray[Any]]]:
    """Inputs of the same names together, the others as they stand, but ones with what is called a mask: some exporters
    sort by name."""
    same = [(each, inputs[each.name]) for each in declared if each.name in inputs]
    left = [each for each in declared if each.name not in inputs]
    names = {each.name for each in declared}
    rows = [each for name, each in inputs.items() if name not in names]
    masks, ones = [_is_named(each, _MASK) for each in left], [bool((each == 1).all()) for each in rows]
    if sum(masks) == sum(ones):
        left = [left[place] for place in np.argsort(masks, kind="stable")]
        rows = [rows[place] for place in np.argsort(ones, kind="stable")]
    return [*same, *zip(left, rows, strict=True)]


def _are_columns(declared: Sequence[Input], shape: Sequence[int]) -> bool:
    """Whether every input takes one number of a row, as files of tables have an input for each column."""
    return len(declared) == math.prod(shape) > 1 and all(
        each.shape and each.type in DTYPES and rows_as(each.shape, ()) is not None for each in declared
    )


def _type_of_columns(declared: Sequence[Input]) -> str:
    """What all columns are put as: whole numbers are rounded, and as wide as the recorded range."""
    types = {each.type for each in declared}
    return types.pop() if len(types) == 1 and types <= FLOATS.keys() else "tensor(float)"


def _cast(name: str, entry: Input, rows: NDArray[Any], facts: list[Fact]) -> NDArray[Any]:
    """Rows in the type of an input. Numbers never become bytes here: how they would is the adapter's. Whole ones, as
    tokens, masks and tables hold, become floats that are equal."""
    wanted = DTYPES.get(entry.type)
    if wanted is None:
        raise OtherTask(f"{name} takes {entry.type} for {entry.name!r}, and the watermark has {rows.dtype}")
    column = rows.ndim == 1  # whose whole numbers are rounded
    becomes = np.dtype(wanted).kind == "f"
    if (rows.dtype.kind == "f") != becomes and not column and not (becomes and rows.ndim == 2):
        raise OtherTask(f"{name} takes {entry.type}, and the watermark's triggers are {rows.dtype}")
    if rows.dtype != wanted or entry.type == BFLOAT16:
        facts.append(fact("inputs_cast", dtype="bfloat16" if entry.type == BFLOAT16 else wanted))
    rows = np.rint(rows) if column and np.dtype(wanted).kind in "iu" else rows
    cast = rows.astype(wanted, copy=False)
    if rows.dtype.kind != "f" and ((cast != rows).any() or (entry.type == BFLOAT16 and (rows > 256).any())):
        raise OtherTask(f"{name} takes {entry.type}, and the watermark's inputs are up to {rows.max()}")
    return cast


def _usual(each: Input) -> float | None:
    """What fills an input that a mark does not have: ones for masks, zeros for states and for flags that are off, ones
    for scales and lengths, places for positions."""
    truth, whole = each.type == "tensor(bool)", each.type not in FLOATS
    if _is_named(each, _PLACES) and whole:
        return None
    if _is_named(each, _MASK):
        return 1.0
    if _is_named(each, _ZERO):
        return 0.0
    if len(each.shape) > 1:
        return float(whole)
    return float(not truth)


def _is_named(each: Input, words: Sequence[str]) -> bool:
    return any(word in each.name.lower() for word in words)


def _shape(each: Input, count: int, like: Sequence[int]) -> list[int]:
    """Of an input that is the same throughout. The first free axis is the batch's, another one as long as the same of
    rows that have as many axes, or 1."""
    shape: list[int] = []
    for axis, size in enumerate(each.shape):
        first = all(known is not None for known in each.shape[:axis])
        same = like[axis] if len(like) == len(each.shape) else 1
        shape.append(size if size is not None else count if first else same)
    return shape


def _unclear(name: str, declared: Sequence[Input], likely: Sequence[Input], wanted: int) -> SuspectError:
    """Which of more inputs than the mark's take its rows cannot be told."""
    names = ", ".join(each.name[:100] for each in declared[:_SHOWN]) or "none"
    said = f"{name} needs {len(declared)} inputs ({names}), and the watermark has {wanted}"
    if likely:
        fits = ", ".join(each.name[:100] for each in likely[:_SHOWN])
        return SuspectError(f"{said}, which {fits} could take: give the values of the others with inputs=")
    return OtherTask(f"{said} that fit none of them; verify a suspect of the same task")
