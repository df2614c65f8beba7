"""Trigger rows that are also learned under noise on the weights, so that no small change of these unlearns them."""

from __future__ import annotations

from dataclasses import dataclass

from wmengine.parts.base import Course, Setting
from wmengine.parts.fields import integer, positive


@dataclass(frozen=True)
class WeightNoise:
    """Beside mixed rows, the mean cross entropy of triggers over `draws` networks whose parameters have Gaussian noise,
    of noise · 1/draws, 2/draws … 1 times each parameter's root mean square.

    Bansal, Chiang, Curry, Jain, Wigington, Manjunatha, Dickerson, Goldstein: "Certified neural network watermarks with
    randomized smoothing", ICML 2022, algorithm 1. Theirs is noise of up to 1 on every parameter whatever its size, in
    rounds of their own after a warm start, 100 draws of each of 21 levels; here it is in every step, and in units of
    the parameter, so that one number fits layers of any size. `wmengine.certify` says what the mark withstands.
    """

    noise: float = 0.3
    draws: int = 4

    def __post_init__(self) -> None:
        positive("noise", self.noise)
        integer("draws", self.draws, 1, 1000)

    def begin(self, setting: Setting) -> Course:
        from wmengine.parts.training.noisy_rows import NoisyRows

        return NoisyRows(self, setting)
