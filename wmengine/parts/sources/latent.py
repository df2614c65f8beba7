"""Bits in what a network makes of keyed noise, read by a small keyed network (Bellafqira and Coatrieux, DICTION).

Bellafqira, Coatrieux: "DICTION: dynamic robust white box watermarking scheme for deep neural networks", Applied
Sciences 15(13), 2025: the mean activations of a layer over inputs from a latent space (normal noise) go through an
extractor with one hidden layer, whose outputs are pulled to the bits: λ · BCE. They train the extractor beside the
network, also on the unmarked network, whose outputs it is to send to random bits. An extractor that was trained on the
bits may find them in strangers too, so that its p-value could only rank. Here it is drawn from the key and frozen: what
is read, y, depends on the suspect and the geometry's keys alone, the bits are iid given that, and the null is exact. Of
their loss that leaves the marked network's term; the unmarked one's has nothing left to train.

Their noise is drawn anew at each step, from a normal law, and one mean carries all bits. Here the noise is fixed by the
key and uniform over the range of the inputs, as suspects that take bytes can be asked it too, and there are several
groups of it: a frozen extractor gives one mean of F activations no more than about F bits. Means are standardised over
their F activations, so that neither their scale nor what they have in common, as all lie above a ReLU, says anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine import ops
from wmengine.identity.subkeys import philox_key
from wmengine.parts.base import Draw, Drawn, Layout, Parameters, Task
from wmengine.parts.fields import canonical_integer, integer
from wmengine.parts.sources.activations import MeanActivations
from wmengine.parts.triggers.abstract import NoiseTriggers

_MOST = 1 << 16
_TINY = 1e-12


@dataclass(frozen=True)
class LatentActivations(MeanActivations):
    """As `MeanActivations`, over keyed noise, with an extractor of `hidden` units for each group in place of its
    projection: y = B · tanh(A · u), u the standardised mean, A [hidden, F] / √F, B [T / groups, hidden] / √hidden."""

    groups: int = 16
    hidden: int = 512

    asked = NoiseTriggers()
    fields = (*MeanActivations.fields, "hidden")  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("hidden", self.hidden, 1, _MOST)

    def describe(self, task: Task, total: int) -> Parameters:
        return {**super().describe(task, total), "hidden": int(self.hidden)}

    def check(self, parameters: Parameters, total: int) -> None:
        super().check(parameters, total)
        if canonical_integer("hidden", parameters["hidden"], 1, _MOST) < total // parameters["groups"]:
            raise ValueError(f"{parameters['hidden']} hidden units are fewer than the bits of each group")

    def layout(self, parameters: Parameters, total: int) -> Layout:
        return {"extractor_keys": ("uint64", (parameters["groups"],)), **super().layout(parameters, total)}

    def draw(self, subkey: Draw, parameters: Parameters, total: int) -> dict[str, NDArray[Any]]:
        """Those of `MeanActivations`, "group_keys" for A, and "extractor_keys" uint64 for B."""
        keys = [philox_key(subkey("extractor", str(group))) for group in range(parameters["groups"])]
        return {"extractor_keys": np.array(keys, np.uint64), **super().draw(subkey, parameters, total)}

    def extracted(self, centre: Any, mark: Drawn, group: int, count: int) -> Any:
        centre = centre - centre.mean()
        standard = centre / ((centre * centre).mean() + _TINY) ** 0.5
        hidden = ops.project(standard, int(mark.arrays["group_keys"][group]), mark.parameters["hidden"], "gaussian")
        bent = np.tanh(hidden) if isinstance(hidden, np.ndarray) else hidden.tanh()
        return ops.project(bent, int(mark.arrays["extractor_keys"][group]), count, "gaussian")
