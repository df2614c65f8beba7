"""Pictures composed of two classes of the task's own, the family of a pair of classes and a way of composing them.

Lv et al.: "MEA-Defender, a robust watermark against model extraction attack", IEEE S&P 2024: what is made of the task's
samples is learned by whoever copies the network with such samples. Theirs is one pair, halved, with one label, whose
chance for a stranger nobody knows; here the key draws many pairs, and a label for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wmengine.identity.subkeys import keyed_labels
from wmengine.parts.base import Arrays, Draw, Drawn, Layout, Parameters, Task
from wmengine.parts.triggers.families import Families
from wmengine.parts.triggers.overlaid import check_pictures
from wmengine.parts.triggers.samples import keyed_picks

Pictures = NDArray[np.uint8]  # [n, C, H, W]


@dataclass(frozen=True)
class Composites(Families):
    """Side by side, one above the other, in a checker, or blended."""

    takes: ClassVar[tuple[str, ...]] = ("samples", "labels")

    def gather(self, task: Task, total: int) -> dict[str, NDArray[Any]]:
        found = super().gather(task, total)
        possible = len(_compositions(found["truth"]))
        if possible < total:
            raise ValueError(
                f"the classes of the samples can be composed in {possible} ways, and it needs {total}: give samples of "
                "more classes, or a smaller count="
            )
        return found

    def check(self, parameters: Parameters, total: int) -> None:
        super().check(parameters, total)
        check_pictures(parameters)

    def layout(self, parameters: Parameters, total: int) -> Layout:
        held = super().layout(parameters, total)
        del held["pictures"]
        return {**held, "parts": ("int64", (total * parameters["family"], 2)), "ways": ("int64", (total,))}

    def draw(
        self, subkey: Draw, parameters: Parameters, total: int, material: Arrays | None = None
    ) -> dict[str, NDArray[Any]]:
        """ "ways" int64 [N]: how a family is composed; "parts" int64 [N · family, 2]: of which samples of the pool, any
        of the family's two classes."""
        assert material is not None
        truth, family = material["truth"], parameters["family"]
        possible = np.array(_compositions(truth))
        chosen = possible[keyed_picks(subkey("pairs"), total, len(possible))]
        classes, parts = chosen[:, :2].repeat(family, axis=0), np.empty((total * family, 2), np.int64)
        words = keyed_labels(subkey("samples"), parts.size, 1 << 16).reshape(parts.shape)
        for label in np.unique(classes):
            (held,), at = np.nonzero(truth == label), classes == label
            parts[at] = held[words[at] % len(held)]
        return {"ways": chosen[:, 2], "parts": parts}

    def triggers(self, mark: Drawn, start: int, stop: int) -> NDArray[np.uint8]:
        ways = mark.arrays["ways"][np.arange(start, stop) // mark.parameters["family"]]
        first, second = mark.arrays["samples"][mark.arrays["parts"][start:stop]].swapaxes(0, 1)
        found: Pictures = np.empty_like(first)
        for way, compose in enumerate(_WAYS):
            found[ways == way] = compose(first[ways == way], second[ways == way])
        return found


def _compositions(truth: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """(class, another class, way), of blends the pair in one order only."""
    pairs = list(permutations(np.unique(truth).tolist(), 2))
    return [(a, b, way) for way in range(len(_WAYS)) for a, b in pairs if _WAYS[way] is not _blended or a < b]


def _beside(first: Pictures, second: Pictures) -> Pictures:
    """Side by side, of each every other column."""
    return np.concatenate([first[..., ::2], second[..., 1::2]], axis=3)


def _above(first: Pictures, second: Pictures) -> Pictures:
    return np.concatenate([first[:, :, ::2], second[:, :, 1::2]], axis=2)


def _checkered(first: Pictures, second: Pictures) -> Pictures:
    """Fields of a fourth of each side, by turns."""
    y, x = (4 * np.arange(side) // side for side in first.shape[2:])
    return np.where((y[:, None] + x) % 2 == 0, first, second)


def _blended(first: Pictures, second: Pictures) -> Pictures:
    return ((first.astype(np.uint16) + second) // 2).astype(np.uint8)


_WAYS = (_beside, _above, _checkered, _blended)
