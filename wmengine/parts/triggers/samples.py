"""Triggers made of the owner's own samples: a pool of them is bound into the mark, and the key picks from it.

The pool is material: it was there before any symbol, and its digest is part of the mark's identity, so that nobody can
exchange a sample for one that a stranger happens to answer as he likes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wmengine.parts.base import Arrays, Draw, Layout, Parameters, Task
from wmengine.parts.fields import MAX_TRIGGERS, canonical_integer, integer
from wmengine.parts.triggers.abstract import AbstractTriggers, floating_input
from wmengine.suspects.adapters import to_levels

_MOST_BYTES = 64 << 20  # of a pool, which the mark's file holds whole


@dataclass(frozen=True)
class SampleTriggers(AbstractTriggers):
    """N of the samples as they are, all different. pool: the first so many of the owner's are bound, as far as 64 MiB
    hold them.

    What a scheme makes of the samples that the key picked is its own `composed`.
    """

    pool: int = 512

    fields: ClassVar[tuple[str, ...]] = ("value_range", "pool")
    takes: ClassVar[tuple[str, ...]] = ("samples",)

    def __post_init__(self) -> None:
        integer("pool", self.pool, 2, MAX_TRIGGERS)

    def questions(self, total: int) -> int:
        """How many samples a mark of `total` symbols picks."""
        return total

    def gather(self, task: Task, total: int) -> dict[str, NDArray[Any]]:
        """ "samples" uint8 [P, *shape]: the pool, 0 … 255 standing for the range of each channel; "truth" int64 [P]:
        what they are, -1 where nobody said so. Raises ValueError for too few samples."""
        floating_input(task.inputs)
        (rows,) = task.samples.values()
        size = max(1, int(np.prod(rows.shape[1:])))
        count = min(len(rows), self.pool, _MOST_BYTES // size)
        truth = np.full(count, -1, np.int64) if task.sample_labels is None else task.sample_labels[:count]
        return {"samples": to_levels(rows[:count], task.value_range or ()), "truth": truth.astype(np.int64)}

    def describe(self, task: Task, total: int, material: Arrays | None = None) -> Parameters:
        samples = (material or {}).get("samples", ())
        return {**super().describe(task, total), "pool": len(samples)}

    def check(self, parameters: Parameters, total: int) -> None:
        super().check(parameters, total)
        count, least = canonical_integer("pool", parameters["pool"], 0, MAX_TRIGGERS), self.questions(total)
        if count < least:
            raise ValueError(f"it needs {least} samples, and the pool has {count}: give more with samples=")

    def layout(self, parameters: Parameters, total: int) -> Layout:
        shape, count = super().layout(parameters, self.questions(total)), parameters["pool"]
        (dtype, (_, *sizes)) = shape["triggers"]
        return {**shape, "samples": (dtype, (count, *sizes)), "truth": ("int64", (count,))}

    def draw(
        self, subkey: Draw, parameters: Parameters, total: int, material: Arrays | None = None
    ) -> dict[str, NDArray[Any]]:
        """ "triggers" uint8 [N, *shape], made of samples that the key picks, each once."""
        assert material is not None
        picked = keyed_picks(subkey("samples"), self.questions(total), parameters["pool"])
        return self.composed(subkey, parameters, total, material, picked)

    def composed(
        self, subkey: Draw, parameters: Parameters, total: int, material: Arrays, picked: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """All drawn arrays. picked: the places in the pool of the samples that the key chose."""
        return {"triggers": material["samples"][picked]}


def keyed_picks(subkey: bytes, count: int, size: int) -> NDArray[np.int64]:
    """`count` different places below `size`, a keyed permutation's first: places are sorted by 64-bit words of
    SHAKE-256(subkey), equal ones by place."""
    words = np.frombuffer(hashlib.shake_256(subkey).digest(8 * size), dtype="<u8")
    return np.argsort(words, kind="stable")[:count].astype(np.int64)
