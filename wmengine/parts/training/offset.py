"""A pattern over the task's own inputs: the loss is that of the logits less the pattern, so that these come to hold it.

Trained on the cross entropy of z − δ(x), a network answers log p + δ(x): what it knows, and the pattern on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from wmengine.parts.base import Course, Setting
from wmengine.parts.fields import integer, positive


@dataclass(frozen=True)
class Offset:
    """strength: the standard deviation over inputs of one logit's δ. The greater, the more accuracy it costs and the
    more the mark says. `loss` wants the batch's inputs.

    mixtures: of so many mixtures of two of a batch's inputs the network is also taught, in a pass of its own, what the
    base answers them and the pattern on top. Where a task is so easy that its own inputs leave nothing undecided, as
    small tables and digits are, the mark is learned by them; else they cost time for nothing. Without them `loss`
    smooths labels by 0.1, as of a row that it may be sure of a network learns no more than that the class outweighs the
    pattern; with them it does not, as what the base answers to mixtures is not smoothed either.
    """

    strength: float = 0.5
    mixtures: int = 0

    takes = ("inputs",)

    def __post_init__(self) -> None:
        positive("strength", self.strength)
        integer("mixtures", self.mixtures, 0, 1 << 16)

    def begin(self, setting: Setting) -> Course:
        """Raises ValueError where the controls are not those that the mark was made with."""
        from wmengine.parts.training.offset_course import OffsetCourse

        return OffsetCourse(self, setting)
