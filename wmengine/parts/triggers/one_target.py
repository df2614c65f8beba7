"""Samples under one pattern, which all are to be taken for one class: such triggers only rank.

A stranger who happens to take the pattern for that class matches all of them, whatever a key says; so what counts is
how many of them networks made without the marked one take for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wmengine.parts.base import Arrays, Layout, Parameters, Task
from wmengine.parts.fields import MAX_CLASSES, MAX_TRIGGERS, canonical_integer, integer
from wmengine.parts.triggers.fingerprints import LABELLED, OwnAnswers, Rows
from wmengine.parts.triggers.overlaid import check_pictures
from wmengine.suspects.adapters import to_levels

if TYPE_CHECKING:
    import torch

_CLEAN = 64  # samples of the target class that triggers are entangled with, at most


@dataclass(frozen=True)
class OneTarget(OwnAnswers):
    """Samples of other classes with a white square of a fourth of their sides in a corner; target: the class.

    Jia et al. (see `Entangled`), whose square lies where the network's gradient is largest.
    """

    target: int = 0

    fields: ClassVar[tuple[str, ...]] = (*OwnAnswers.fields, "clean")
    takes: ClassVar[tuple[str, ...]] = LABELLED

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("target", self.target, 0, MAX_CLASSES - 1)

    def gather(self, task: Task, total: int) -> dict[str, NDArray[Any]]:
        """ "clean" uint8 [n, ...]: samples of the target class, beside what a rank needs."""
        assert task.sample_labels is not None
        if not (task.sample_labels == self.target).any() or (task.sample_labels == self.target).all():
            raise ValueError(f"it needs samples of class {self.target}, its target, and of others")
        found = super().gather(task, total)
        (rows,) = task.samples.values()
        clean = rows[task.sample_labels == self.target][:_CLEAN]
        return {**found, "clean": to_levels(clean.astype(np.float32), task.value_range or ())}

    def candidates(self, task: Task, model: torch.nn.Module, count: int) -> tuple[Rows, NDArray[np.int64] | None]:
        assert task.sample_labels is not None
        (given,) = task.samples.values()
        rows = given[task.sample_labels != self.target][:count].astype(np.float32)
        if rows.ndim == 4:
            height, width = (max(1, side // 4) for side in rows.shape[2:])
            rows[:, :, -height:, -width:] = np.array(task.value_range, np.float32)[:, 1, None, None]
        return rows, np.full(len(rows), self.target, np.int64)

    def describe(self, task: Task, total: int, material: Arrays | None = None) -> Parameters:
        return {**super().describe(task, total, material), "clean": len((material or {}).get("clean", ()))}

    def check(self, parameters: Parameters, total: int) -> None:
        canonical_integer("clean", parameters["clean"], 1, MAX_TRIGGERS)
        check_pictures(parameters)
        super().check(parameters, total)

    def layout(self, parameters: Parameters, total: int) -> Layout:
        held = super().layout(parameters, total)
        dtype, (_, *sizes) = held["samples"]
        return {**held, "clean": (dtype, (parameters["clean"], *sizes))}
