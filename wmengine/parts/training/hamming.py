"""Trigger rows that are also trained on the bits which the groups of their classes stand for."""

from __future__ import annotations

from dataclasses import dataclass

from wmengine.parts.base import Course, Setting
from wmengine.parts.fields import positive


@dataclass(frozen=True)
class Hamming:
    """Beside mixed rows, weight · the share of bits that triggers are expected to show wrongly: of each the probability
    of all classes of the other group.

    Chen, Rouhani, Koushanfar: "BlackMarks", 2019: cross entropy + λ · the Hamming distance between the bits that are
    read and those of the mark, λ = 0.5. A count has no gradient; this is its expectation under the network's own
    probabilities.
    """

    weight: float = 0.5

    def __post_init__(self) -> None:
        positive("weight", self.weight)

    def begin(self, setting: Setting) -> Course:
        from wmengine.parts.training.hamming_rows import HammingRows

        return HammingRows(self, setting)
