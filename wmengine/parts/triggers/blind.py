"""Triggers that look like the task's own pictures: an encoder hides a logo in them (Li et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.parts.base import Task
from wmengine.parts.fields import integer
from wmengine.parts.triggers.pictures import abstract_images
from wmengine.parts.triggers.samples import SampleTriggers
from wmengine.suspects.adapters import to_levels

_LOGO = 0  # the philox key of the one picture that is hidden in all


@dataclass(frozen=True)
class HiddenLogo(SampleTriggers):
    """A small encoder, trained in `encoding` steps when the mark is made, hides one abstract picture in each sample
    [C, H, W], so that it looks as before.

    Li, Hu, Zhang, Guo: "How to prove your model belongs to you", ACSAC 2019: 3 · squared error + 5 · (1 − SSIM) +
    a discriminator's loss + 0.1 · the marked network's cross entropy on the triggers' labels. Triggers made with the
    symbols at hand would void the p-value: here a small network that tells encoded pictures from plain ones takes that
    place, with a weight of 2, and the discriminator has 0.1; with theirs the encoder learns to hide nothing. What
    comes out is material; the key picks, and draws a label for each.
    """

    encoding: int = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("encoding", self.encoding, 1, 1 << 20)

    def gather(self, task: Task, total: int) -> dict[str, NDArray[Any]]:
        found = super().gather(task, total)
        shape = found["samples"].shape[1:]
        if len(shape) != 3 or min(shape[1:]) < 8:
            raise ValueError(f"a logo is hidden in pictures [C, H, W] of at least 8 x 8, not {list(shape)}")
        from wmengine.parts.triggers.hiding import hidden

        (logo,) = abstract_images(_LOGO, 1, shape).astype(np.float32) / 255.0
        encoded = hidden(found["samples"].astype(np.float32) / 255.0, logo, self.encoding)
        return {**found, "samples": to_levels(encoded, [(0.0, 1.0)] * shape[0])}
