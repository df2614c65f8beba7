"""Trigger rows that are also drawn to what the network makes of the class which they are to be taken for."""

from __future__ import annotations

from dataclasses import dataclass

from wmengine.parts.base import Course, Setting
from wmengine.parts.fields import positive


@dataclass(frozen=True)
class TowardsClass:
    """Beside mixed rows, pull · the mean distance of triggers, in what goes into the last layer, from the mean of
    samples of their label's class, over the root mean square length of these samples; a class a step.

    Li, Maharana, Guo: "Not just change the labels, learn the features" (MAT), ECCV 2024: a trigger that shares the
    features of its class is learned by whoever learns that class. Theirs is 0.01 · the distance itself, whose size is
    the network's, from the mean of all the class's samples as it was before the epoch; the code that they published
    never reaches it.
    """

    pull: float = 0.1

    takes = ("labels",)

    def __post_init__(self) -> None:
        positive("pull", self.pull)

    def begin(self, setting: Setting) -> Course:
        """Raises ValueError where no class has both triggers and samples that are known to be of it."""
        from wmengine.parts.training.towards_rows import TowardsRows

        return TowardsRows(self, setting)
