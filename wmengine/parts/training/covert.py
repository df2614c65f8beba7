"""A term of the loss that pulls y_t to its bit, and one that keeps the weights from looking as if it did."""

from __future__ import annotations

from dataclasses import dataclass

from wmengine.parts.base import Course, Setting
from wmengine.parts.fields import positive


@dataclass(frozen=True)
class Covert:
    """strength: λ1, times the binary cross entropy summed over the bits; critic: λ2, times what a critic makes of it.

    Wang, Kerschbaum: "RIGA", WWW 2021: the critic learns to tell weights with the mark from weights without, however
    they are ordered, and the weights learn to be taken for the latter. Theirs sees trained networks without the mark;
    this one sees the marked weight as it was when the `Embedder` was made, so make that of a network that is trained
    already: of a fresh one, the weights are drawn to how fresh weights are spread.
    """

    strength: float = 0.05
    critic: float = 0.3

    def __post_init__(self) -> None:
        positive("strength", self.strength)
        positive("critic", self.critic)

    def begin(self, setting: Setting) -> Course:
        """Raises ValueError where the model's weights are not those of the mark."""
        from wmengine.parts.training.covert_term import CovertTerm

        return CovertTerm(float(self.strength), float(self.critic), setting)
