"""Bits that a keyed function reads from the flat values w of one weight, where a projection of them is not enough.

y [T] is a function of the suspect, the parameters and the geometry, and of no bit, so that the null is exact. Each
extractor is written once, in plain operations that arrays and tensors share: what training pulls is what is read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine import ops
from wmengine.identity.subkeys import philox_key
from wmengine.parts.base import Draw, Drawn, Layout, Need, Observations, Parameters, Task
from wmengine.parts.fields import MAX_DIMENSION, canonical_integer, integer, one_of
from wmengine.parts.sources.weights import Array, check_carriers, folded, marked_carriers, observed
from wmengine.suspects.base import Suspect

EXTRACTORS = ("perceptron", "filtered", "largest")
ROUNDS = 4  # of `filtered`
_LAYERS = {"perceptron": 2, "filtered": 1, "largest": 0}  # keyed projections

Read = Callable[[Any], Any]  # y [T] of w [M], arrays or tensors


@dataclass(frozen=True)
class Extracted:
    """extractor: the function; width: what it has inside; marked: the "widest" weight, or a place in the order of
    execution. w [M] is the weight as it stands after folding the normalisation behind it.

    "perceptron" (Wang, Kerschbaum: "RIGA", WWW 2021): two layers, y = X2 · relu(X1 · w / rms(w)). X1 is a keyed sketch
    of M values in `width` buckets, X2 a keyed Gaussian matrix, neither is stored. Their reader is trained together with
    the model until it says the bits; such a one finds them in strangers too, so ours is drawn and never trained.

    "filtered" (Yao, Song, Jin: "Hashed watermark as a filter", arXiv 2507.11137, and the authors' code): four times
    what a mask of T bits, laid over the values again and again, lets through; value i of the rest goes to pool i mod
    `width`, and y = X · the means of the pools, X keyed and Gaussian. Their mask is the watermark itself, so that y
    depends on the symbols; ours is the geometry's. Half of it is ones: as much of w is left under every key.

    "largest" (Liu, Weng, Zhu: "Watermarking DNNs with greedy residuals", ICML 2021, and the authors' code): w is
    averaged in T · `width` equal stretches, where theirs may overlap, and y_t is the mean of `width` of them, the
    smaller half counting as 0. No key says where the bits are: everybody can see such a mark's place, and take it out.
    """

    extractor: str
    width: int
    marked: str | int = "widest"

    needs = Need.TENSORS
    fields = ("extractor", "width", "carriers", "carrier_indices")

    def __post_init__(self) -> None:
        one_of("extractor", self.extractor, EXTRACTORS)
        integer("width", self.width, 2, MAX_DIMENSION)
        if isinstance(self.marked, str):
            one_of("marked", self.marked, ("widest",))
        else:
            integer("marked", self.marked, 0, MAX_DIMENSION)

    def describe(self, task: Task, total: int) -> Parameters:
        return {"extractor": self.extractor, "width": int(self.width), **marked_carriers(task, self.marked)}

    def check(self, parameters: Parameters, total: int) -> None:
        extractor = one_of("extractor", parameters["extractor"], EXTRACTORS)
        width = canonical_integer("width", parameters["width"], 2, MAX_DIMENSION)
        check_carriers(parameters)
        if len(parameters["carriers"]) != 1:
            raise ValueError("it marks one weight")
        needed, left = width, math.prod(parameters["carriers"][0])
        if extractor == "largest":
            needed *= total
        elif width < total:
            raise ValueError(f"width must be at least the number of bits, {total}, and it is {width}")
        if extractor == "filtered":
            for _ in range(ROUNDS):
                left = left // total * (total // 2)
        if left < needed:
            raise ValueError(
                f"{total} bits at a width of {width} need {needed} values, and {left} are left of the weight to be "
                "marked: ask for less with width=... or bits=..."
            )

    def layout(self, parameters: Parameters, total: int) -> Layout:
        extractor = parameters["extractor"]
        arrays: Layout = {"layer_keys": ("uint64", (_LAYERS[extractor],))} if _LAYERS[extractor] else {}
        return arrays | ({"filter": ("uint8", (total,))} if extractor == "filtered" else {})

    def draw(self, subkey: Draw, parameters: Parameters, total: int) -> dict[str, NDArray[Any]]:
        """ "layer_keys" uint64: the Philox keys of the projections; "filter" uint8 [T]: the mask, T // 2 of it 1."""
        drawn: dict[str, NDArray[Any]] = {}
        layers = [philox_key(subkey("projection", str(layer))) for layer in range(_LAYERS[parameters["extractor"]])]
        if layers:
            drawn["layer_keys"] = np.array(layers, np.uint64)
        if parameters["extractor"] == "filtered":
            words = np.frombuffer(hashlib.shake_256(subkey("filter")).digest(8 * total), "<u8")
            drawn["filter"] = np.zeros(total, np.uint8)
            drawn["filter"][np.argsort(words, kind="stable")[: total // 2]] = 1
        return drawn

    def observe(self, mark: Drawn, suspect: Suspect, total: int) -> Observations:
        read = extractor_of(mark, total)

        def part(_: int, values: Array, factors: Array | None) -> NDArray[Any]:
            flat = folded(values, factors, "flat").reshape(-1)
            with np.errstate(all="ignore"):  # what is not finite is no bit
                return np.asarray(read(np.asarray(flat, np.float32)), np.float64)

        def whole(parts: Sequence[NDArray[Any] | None]) -> NDArray[np.float64]:
            (only,) = parts
            return np.zeros(total) if only is None else only

        return observed(mark, suspect, part, whole)


def extractor_of(mark: Drawn, total: int) -> Read:
    """What reads y [T] of a mark from w [M], a float array or a tensor, in its precision; differentiable."""
    parameters = mark.parameters
    width, keys = parameters["width"], [int(key) for key in mark.arrays.get("layer_keys", ())]
    if parameters["extractor"] == "perceptron":
        return lambda w: _perceptron(w, keys, width, total)
    if parameters["extractor"] == "largest":
        return lambda w: _largest(w, width, total)
    count = math.prod(parameters["carriers"][0])
    return _Filtered(filtered_places(mark.arrays["filter"], count, width), keys[0], total)


def _perceptron(w: Any, keys: list[int], width: int, total: int) -> Any:
    """Of an unmarked network y has standard deviation 1.

    What is added to the size moves no sign, and keeps the gradient small where w is 0, behind a normalisation that
    starts so.
    """
    size = ((w * w).mean() + 1e-6) ** 0.5
    hidden = ops.sketch(w / size, keys[0], width)
    return 2.0**0.5 * ops.project((hidden + abs(hidden)) / 2.0, keys[1], total, "gaussian")


def _largest(w: Any, width: int, total: int) -> Any:
    stretch = len(w) // (total * width)
    pooled = w[: total * width * stretch].reshape(total, width, stretch).mean(-1)
    if isinstance(w, np.ndarray):
        order = np.argpartition(-abs(pooled), width // 2 - 1, axis=1)
        return np.take_along_axis(pooled, order[:, : width // 2], axis=1).sum(1) / width
    largest = pooled.abs().topk(width // 2, dim=1, sorted=False).indices
    return pooled.gather(1, largest).sum(1) / width


def filtered_places(mask: NDArray[np.uint8], count: int, width: int) -> NDArray[np.int64]:
    """int64 [rows, width]: the places among `count` values that four rounds of the mask leave, column j pool j."""
    (ones,) = np.nonzero(mask)
    places = np.arange(count)
    for _ in range(ROUNDS):
        kept = places[: len(places) // len(mask) * len(mask)].reshape(-1, len(mask))[:, ones]
        places = kept.reshape(-1)
    return places[: len(places) // width * width].reshape(-1, width)


class _Filtered:
    """The places lie on each device that asked for them: a copy in every step would stall it."""

    def __init__(self, places: NDArray[np.int64], key: int, total: int) -> None:
        self._places, self._key, self._total = places, key, total
        self._placed: dict[Any, Any] = {}

    def __call__(self, w: Any) -> Any:
        places: Any = self._places
        if not isinstance(w, np.ndarray):
            import torch

            if w.device not in self._placed:
                self._placed[w.device] = torch.from_numpy(self._places).to(w.device)
            places = self._placed[w.device]
        means = w[places].mean(0)
        return len(means) ** 0.5 * ops.project(means, self._key, self._total, "gaussian")
