"""Triggers from the task's own pictures: under a keyed pattern or under keyed noise (Zhang et al. 2018).

Zhang, Gu, Jang, Wu, Stoecklin, Huang, Molloy: "Protecting intellectual property of deep neural networks with
watermarking", AsiaCCS 2018. Theirs lay one text or one noise over pictures of one class and give all of them one label,
whose chance for a stranger nobody knows. Here each picture has a pattern or noise of its own and a label of its own,
all drawn from the key: the null is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.identity.subkeys import keyed_labels, philox_key
from wmengine.parts.base import Arrays, Draw, Parameters
from wmengine.parts.triggers.pictures import abstract_images, noise_inputs
from wmengine.parts.triggers.samples import SampleTriggers

_BYTES = 4  # a Gaussian is the sum of so many uniform bytes, of standard deviation 147.8
_SCALE, _HALF_BITS = 88, 7  # times 88 / 128: 101.6 of 255, 0.4 of the range


@dataclass(frozen=True)
class PatternTriggers(SampleTriggers):
    """Over each sample [C, H, W] a picture of half its sides, drawn from the key as it is, at a keyed place."""

    def check(self, parameters: Parameters, total: int) -> None:
        super().check(parameters, total)
        check_pictures(parameters)

    def composed(
        self, subkey: Draw, parameters: Parameters, total: int, material: Arrays, picked: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        triggers: NDArray[np.uint8] = material["samples"][picked].copy()
        channels, height, width = triggers.shape[1:]
        sides = height // 2, width // 2
        patterns = abstract_images(philox_key(subkey("patterns")), total, (channels, *sides))
        tops = keyed_labels(subkey("tops"), total, height - sides[0] + 1)
        lefts = keyed_labels(subkey("lefts"), total, width - sides[1] + 1)
        for trigger, pattern, top, left in zip(triggers, patterns, tops, lefts, strict=True):
            trigger[:, top : top + sides[0], left : left + sides[1]] = pattern
        return {"triggers": triggers}


@dataclass(frozen=True)
class NoisyTriggers(SampleTriggers):
    """To each sample, of any shape, Gaussian noise of 0.4 of its range is added and cut off at its ends."""

    def composed(
        self, subkey: Draw, parameters: Parameters, total: int, material: Arrays, picked: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        samples: NDArray[np.uint8] = material["samples"][picked]
        size = math.prod(samples.shape[1:])
        drawn = noise_inputs(philox_key(subkey("noise")), total, (_BYTES, size)).astype(np.int64)
        noise = ((drawn.sum(axis=1) - _BYTES * 255 // 2) * _SCALE) >> _HALF_BITS
        return {"triggers": (samples + noise.reshape(samples.shape)).clip(0, 255).astype(np.uint8)}


def check_pictures(parameters: Parameters) -> None:
    """Raises ValueError unless the inputs are pictures."""
    (given,) = parameters["inputs"]
    if len(given["shape"]) != 3 or min(given["shape"][1:]) < 4:
        raise ValueError(
            f"its triggers are made of pictures [C, H, W] of at least 4 x 4, not {given['shape']}: 'zhang_noise' and "
            "'class_feature' take samples of any shape"
        )
