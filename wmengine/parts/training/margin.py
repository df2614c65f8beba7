"""Trigger rows that are also learned where an adversary would push them, so that their margin grows."""

from __future__ import annotations

from dataclasses import dataclass

from wmengine.parts.base import Course, Setting
from wmengine.parts.fields import integer, positive


@dataclass(frozen=True)
class Margin:
    """Beside mixed rows, weight · the cross entropy of triggers that were pushed away from their labels: `pushes` steps
    of 1/255 of each channel's range along the sign of the loss's gradient, within the range.

    Kim, Lee, Lee, Son, Hwang: "Margin-based neural network watermarking", ICML 2023, equation 3 and their code. Theirs
    learn pushed triggers only, a mixture of the task's own pictures; ours are the abstract ones of `adi`, learned as
    they are too, and the network is pushed against in eval mode, as a thief would run it.
    """

    weight: float = 0.1
    pushes: int = 5

    def __post_init__(self) -> None:
        positive("weight", self.weight)
        integer("pushes", self.pushes, 1, 100)

    def begin(self, setting: Setting) -> Course:
        from wmengine.parts.training.margin_rows import MarginRows

        return MarginRows(self, setting)
