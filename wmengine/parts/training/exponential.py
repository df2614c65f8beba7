"""Trigger rows that are also learned through exponential weights, which only large weights come through."""

from __future__ import annotations

from dataclasses import dataclass

from wmengine.parts.base import Course, Setting
from wmengine.parts.fields import positive


@dataclass(frozen=True)
class Exponential:
    """Beside mixed rows the cross entropy of triggers where every marked layer has w · exp(T|w|) / max exp(T|w|) in
    place of w (Namba and Sakuma: "Robust watermarking of neural network with exponential weighting", AsiaCCS 2019,
    equation 2): what they learn has to lie in weights that pruning and fine-tuning leave alone.

    temperature: T. Theirs are in place of the weights for the task's rows too, in a second training; here the task
    learns with the network's own, which are what is shipped.
    """

    temperature: float = 2.0

    def __post_init__(self) -> None:
        positive("temperature", self.temperature)

    def begin(self, setting: Setting) -> Course:
        from wmengine.parts.training.exponential_rows import ExponentialRows

        return ExponentialRows(self, setting)
