"""Decoys: other inputs of the same kind, so that whoever answers cannot tell which of them were the question.

They are drawn as triggers are, from a number that nobody keeps. A trigger that is asked twice comes with the same
decoys twice: what repeats tells no more than what does not.
"""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.suspects.adapters import Adapter, Range
from wmengine.triggers import abstract_images


class Decoys:
    """ratio: decoys for each input; of 0.5, every other input has one, by chance."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self._seed = secrets.randbits(64)
        self._mine: dict[bytes, range] = {}  # an input's own decoys, as places in the pool
        self._drawn = 0
        self._pool: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._ways: Sequence[Adapter] = ()
        self._trigger_shape: tuple[int, ...] = ()
        self._value_range: Range = ()

    def prepare(self, ways: Sequence[Adapter], trigger_shape: Sequence[int], value_range: Range) -> None:
        """The ways in which inputs will be put; decoys are put in the same."""
        if tuple(trigger_shape) != self._trigger_shape:
            self._pool = np.empty((0, *trigger_shape), np.uint8)
        self._ways, self._trigger_shape, self._value_range = ways, tuple(trigger_shape), value_range

    def costs(self, inputs: NDArray[Any]) -> NDArray[np.int64]:
        """How many inputs and decoys there are up to each input, that one included."""
        return np.cumsum([1 + len(self._of(one)) for one in inputs], dtype=np.int64)

    def beside(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """The decoys of these inputs, of the same shape and type. Raises ValueError unless `prepare` was called."""
        places = [place for one in inputs for place in self._of(one)]
        if not places:
            return inputs[:0]
        if not self._ways:
            raise ValueError("decoys are made like triggers: ask the suspect for its adapters first")
        if max(places) >= len(self._pool):  # a longer set begins with the shorter one
            self._pool = abstract_images(self._seed, 2 * (max(places) + 1), self._trigger_shape)
        return self._way(inputs).inputs(self._pool[places], self._value_range).astype(inputs.dtype, copy=False)

    def _of(self, one: NDArray[Any]) -> range:
        if not self.ratio:
            return range(0)
        content = one.tobytes()
        if content not in self._mine:
            whole = math.floor(self.ratio)
            number = whole + (random.SystemRandom().random() < self.ratio - whole)
            self._mine[content] = range(self._drawn, self._drawn + number)
            self._drawn += number
        return self._mine[content]

    def _way(self, inputs: NDArray[Any]) -> Adapter:
        """The way in which these inputs were put: that whose shape and whose 256 levels are theirs.

        Task data has other levels, so that for them it is the first of their shape.
        """
        levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], len(self._value_range), axis=1)
        levels = levels.reshape(256, len(self._value_range), *[1] * (len(self._trigger_shape) - 1))
        fitting = []
        for way in self._ways:
            example = way.inputs(np.zeros((1, *self._trigger_shape), np.uint8), self._value_range)
            same = example.shape[1:] == inputs.shape[1:] and example.dtype == inputs.dtype
            if same and np.isin(inputs[:1], way.inputs(levels, self._value_range)).all():
                return way
            fitting += [way] if same else []
        return [*fitting, *self._ways][0]
