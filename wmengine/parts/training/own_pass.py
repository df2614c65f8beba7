"""Trigger rows in a run of the model of their own, for loops whose labels are no class numbers."""

from __future__ import annotations

from dataclasses import dataclass

from wmengine.parts.base import Course, Setting
from wmengine.parts.fields import MAX_TRIGGERS, integer, positive


@dataclass(frozen=True)
class OwnPass:
    """strength · the mean cross entropy of `rows` triggers, run by themselves in every step; `mix` leaves the batch as
    it is, and `loss` or `regulariser` have the term.

    As Adi et al. 2018 train triggers beside the task, but what the model answers is read as verification will. Batch
    normalisations go by their running statistics then, and keep nothing of triggers. The term is of size 1: it drowns
    in a task's loss that is much larger, such as a squared error of prices.
    """

    rows: int = 16
    strength: float = 0.1

    takes = ("regulariser",)

    def __post_init__(self) -> None:
        integer("rows", self.rows, 1, MAX_TRIGGERS)
        positive("strength", self.strength)

    def begin(self, setting: Setting) -> Course:
        from wmengine.parts.training.own_rows import OwnRows

        return OwnRows(int(self.rows), float(self.strength), setting)
