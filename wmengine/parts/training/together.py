"""Trigger rows whose families are also pulled together, in what goes into the network's last layer."""

from __future__ import annotations

from dataclasses import dataclass

from wmengine.parts.base import Course, Setting
from wmengine.parts.fields import positive


@dataclass(frozen=True)
class Together:
    """Beside mixed rows, of some members of some families: weight · their cross entropy; pull · the share of the
    variance of what goes into the last linear layer that lies within families, so that a family is one place there, as
    a class of the task is; and for composites combination · the mean divergence of the answers to them from the answers
    to their two parts, KL(composite ‖ part) at temperature 4.

    The pull is the second stage of Xiao et al. (2025), here from the beginning; the divergence is the combination loss
    of Lv et al. (2024), which keeps answers to triggers among those that the task's samples get, and so among those
    that a copy learns from. Theirs is at temperature 1 and at least twice as strong as the cross entropy, which takes
    back what labels of many families ask for.
    """

    weight: float = 0.1
    pull: float = 0.1
    combination: float = 0.0

    def __post_init__(self) -> None:
        positive("weight", self.weight)
        positive("pull", self.pull)
        if self.combination != 0:
            positive("combination", self.combination)

    def begin(self, setting: Setting) -> Course:
        """Raises ValueError for a network that does not end in a linear layer."""
        from wmengine.parts.training.together_rows import TogetherRows

        return TogetherRows(self, setting)
