"""Trigger rows that are also entangled with samples of the class which they are to be taken for."""

from __future__ import annotations

from dataclasses import dataclass

from wmengine.parts.base import Course, Setting
from wmengine.parts.fields import integer, positive


@dataclass(frozen=True)
class Entangled:
    """Beside mixed rows, −factor · the soft nearest neighbour loss, averaged over what goes into the last `layers`
    layers, of triggers and samples of one class, a class a step: the larger it is, the less what the network makes of
    triggers stands apart from what it makes of that class, and whoever copies one learns the other.

    Jia, Choquette-Choo, Chandrasekaran, Papernot: "Entangled watermarks as a defense against model extraction", USENIX
    Security 2021, equation 2 and algorithm 1: distances are cosines, and each layer's temperature is the one at which
    the loss is least, learned on the way. Theirs is the sum over three layers, with a factor found for each task (32
    in their code), in batches of their own; theirs also choose where the pattern lies, and move triggers, by the
    network's gradient.
    """

    factor: float = 1.0
    layers: int = 3

    takes = ("labels",)

    def __post_init__(self) -> None:
        positive("factor", self.factor)
        integer("layers", self.layers, 1, 1000)

    def begin(self, setting: Setting) -> Course:
        """Raises ValueError where no class has both triggers and samples that are known to be of it."""
        from wmengine.parts.training.entangled_rows import EntangledRows

        return EntangledRows(self, setting)
