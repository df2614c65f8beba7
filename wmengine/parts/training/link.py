"""A term of the loss that pulls y_t to its bit: strength × the link, summed over the bits, of the live weights."""

from __future__ import annotations

from dataclasses import dataclass

from wmengine.ops.reference import LINKS
from wmengine.parts.base import Course, Setting
from wmengine.parts.fields import one_of, positive
from wmengine.parts.sources.extracted import Extracted


@dataclass(frozen=True)
class Link:
    """link: "bce", "hinge", "mse" or "stdm"; strength: the factor λ; margin: where `hinge` and `mse` want s·y to be."""

    link: str = "bce"
    strength: float = 0.01
    margin: float = 1.0

    def __post_init__(self) -> None:
        one_of("link", self.link, LINKS)
        positive("strength", self.strength)
        positive("margin", self.margin)

    def begin(self, setting: Setting) -> Course:
        """Raises ValueError where the model's weights cannot carry the bits."""
        from wmengine.parts.training.extracted_term import ExtractedTerm
        from wmengine.parts.training.weight_term import WeightTerm

        course = ExtractedTerm if isinstance(setting.source, Extracted) else WeightTerm
        return course(self.link, float(self.strength), float(self.margin), setting)
