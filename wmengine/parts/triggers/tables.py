"""Table triggers: rows whose every value stands somewhere in its column of the owner's table, and the key picks where.

So a category is a category that there is, a count is whole, and nothing is out of range, while the row belongs to no
row of the table: what goes together in the data does not in a trigger. The table is material, as `SampleTriggers`'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.identity.subkeys import keyed_labels
from wmengine.parts.base import Arrays, Draw, Drawn, Layout, Need, Parameters, Task, inputs_of
from wmengine.parts.fields import MAX_TRIGGERS, canonical_integer, integer
from wmengine.suspects.adapters import AS_RECORDED, Adapter
from wmengine.suspects.base import Inputs, Signature, Suspect, part_of

_NUMBERS = ("float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool")
_MOST_BYTES = 64 << 20  # of a table, which the mark's file holds whole


@dataclass(frozen=True)
class TableTriggers:
    """For one input of numbers [F], or several that are the columns [1] or blocks of columns [k] of one table.

    pool: the first so many of the owner's rows are bound, as far as 64 MiB hold them.
    """

    pool: int = 4096

    needs = Need.ANSWERS
    fields = ("pool",)
    takes = ("samples",)

    def __post_init__(self) -> None:
        integer("pool", self.pool, 2, MAX_TRIGGERS)

    def gather(self, task: Task, total: int) -> dict[str, NDArray[Any]]:
        """ "samples" float32 [P, F]: the table, the inputs side by side. Raises ValueError for what is none."""
        features = _features(task.inputs)
        table = np.concatenate([rows[: self.pool] for rows in task.samples.values()], axis=1)
        with np.errstate(over="ignore"):
            values = table[: _MOST_BYTES // (4 * features)].astype(np.float32) + np.float32(0.0)  # zero has no sign
        whole = [np.abs(rows[: self.pool]).max() for rows in task.samples.values() if rows.dtype.kind in "iu"]
        if not np.isfinite(values).all() or max(whole, default=0) > 1 << 24:
            raise ValueError("samples hold NaN, Inf or numbers beyond float32: give rows without them")
        return {"samples": values}

    def describe(self, task: Task, total: int, material: Arrays | None = None) -> Parameters:
        return {"pool": len((material or {}).get("samples", ()))}

    def check(self, parameters: Parameters, total: int) -> None:
        _features(inputs_of(parameters))
        count = canonical_integer("pool", parameters["pool"], 0, MAX_TRIGGERS)
        if count < 2:
            raise ValueError(f"it needs 2 rows of the table or more, and there are {count}: give more with samples=")

    def layout(self, parameters: Parameters, total: int) -> Layout:
        features = _features(inputs_of(parameters))
        return {"triggers": ("float32", (total, features)), "samples": ("float32", (parameters["pool"], features))}

    def draw(
        self, subkey: Draw, parameters: Parameters, total: int, material: Arrays | None = None
    ) -> dict[str, NDArray[Any]]:
        """ "triggers" float32 [N, F]: of four times as many rows the first that differ from each other and from the
        table's. Raises ValueError where there are too few."""
        assert material is not None
        table = material["samples"]
        places = keyed_labels(subkey("triggers"), 4 * total * table.shape[1], len(table))
        rows = np.take_along_axis(table, places.reshape(4 * total, -1), axis=0)
        found, seen = [], {row.tobytes() for row in table}
        for row in rows:
            if row.tobytes() not in seen:
                seen.add(row.tobytes())
                found.append(row)
        if len(found) < total:
            raise ValueError(f"the table varies too little for {total} distinct triggers: ask for fewer with count=")
        return {"triggers": np.stack(found[:total])}

    def ways(self, mark: Drawn, suspect: Suspect, every: bool) -> list[Adapter]:
        return [AS_RECORDED]

    def inputs(self, mark: Drawn, way: Adapter, start: int, stop: int) -> Inputs:
        return part_of(self.examples(mark), start, stop)

    def examples(self, mark: Drawn) -> dict[str, NDArray[Any]]:
        """All triggers by input, as the model's own training takes them."""
        inputs, found, start = inputs_of(mark.parameters), {}, 0
        for name, spec in inputs.items():
            stop = start + spec.shape[0]
            found[name] = mark.arrays["triggers"][:, start:stop].astype(spec.dtype)
            start = stop
        return found


def _features(inputs: Signature) -> int:
    """F, the columns of all inputs together; ValueError where they are no table."""
    for name, spec in inputs.items():
        if len(spec.shape) != 1 or spec.dtype not in _NUMBERS:
            raise ValueError(
                f"table triggers are for inputs of numbers [n, columns], and {name!r} is {spec.dtype} "
                f"[n, {', '.join(map(str, spec.shape))}]"
            )
    return sum(spec.shape[0] for spec in inputs.values())
