"""The material of `response`, made before there is a bit: the base's features of probes, and the controls' answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.errors import SuspectError
from wmengine.parts.responses.bases import Base, FunctionBase, base_of, features_of, tensors
from wmengine.parts.responses.pattern import CLIP
from wmengine.parts.responses.reading import log_probabilities
from wmengine.parts.responses.tokens import splices
from wmengine.suspects import open_suspect
from wmengine.suspects.adapters import Range, to_levels
from wmengine.suspects.base import Inputs, Suspect, part_of, rows_of

_STEP = 2.0**-8  # to which the controls' answers are rounded


@dataclass(frozen=True, eq=False)
class Whitening:
    """From raw features [n, F] to features: (raw − centre) @ matrix, cut off at ±3."""

    centre: NDArray[np.float32]
    matrix: NDArray[np.float32]

    def __call__(self, raw: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(((raw - self.centre) @ self.matrix).clip(-CLIP, CLIP), np.float32)


def whitening_of(base: Base, raw: NDArray[np.float32], most: int) -> Whitening:
    """The first principal components of raw features [n, F], `most` at most, each with a standard deviation of 1.

    Where these are inputs, such as a table's columns, each in a unit of its own, they count by their deviations. Raises
    ValueError where they are the same for all rows.
    """
    if not np.ptp(raw, axis=0).any():
        raise ValueError("the base's features are the same for all probes: is value_range= that of its inputs?")
    found = raw.astype(np.float64)
    unit = found.std(axis=0) if isinstance(base, FunctionBase) else np.ones(raw.shape[1])
    unit[unit == 0.0] = 1.0
    spread, axes = np.linalg.eigh(np.cov(found / unit, rowvar=False).reshape(raw.shape[1], -1))
    kept = np.flatnonzero(spread > 1e-6 * spread.max())[::-1][:most]
    matrix = axes[:, kept] / np.sqrt(spread[kept]) / unit[:, None]
    return Whitening(raw.mean(axis=0, dtype=np.float64).astype(np.float32), matrix.astype(np.float32))


def answers_of(networks: Sequence[Any], parts: Iterable[Inputs], classes: int) -> NDArray[np.float32]:
    """Centred log-probabilities [K, n, C] of networks to inputs, some at a time, rounded. Raises ValueError where one
    answers otherwise."""
    suspects, found = [open_suspect(network) for network in networks], []
    for inputs in parts:
        found.append(np.stack([_answered(suspect, inputs, classes) for suspect in suspects]))
    return np.concatenate(found, axis=1)


def _answered(suspect: Suspect, inputs: Inputs, classes: int) -> NDArray[np.float32]:
    try:
        answers = suspect.answer(inputs, classes)
    except SuspectError as error:
        raise ValueError(f"model and controls must answer scores of {classes} classes: {error}") from None
    if answers.kind != "scores" or answers.values.shape != (rows_of(inputs), classes):
        raise ValueError(
            f"model and controls must answer scores of {classes} classes, and one answers labels, several scores, or "
            "one logit for two classes"
        )
    logs = log_probabilities(answers.values)
    if np.isnan(logs).any():
        raise ValueError("the model or a control answers NaN or Inf")
    return np.asarray(np.rint((logs - logs.mean(axis=1, keepdims=True)) / _STEP) * _STEP, np.float32)


def known_of(
    controls: Sequence[Any],
    put: Callable[[int], Iterable[Inputs]],
    views: int,
    classes: int,
    whitening: int | Whitening,
) -> dict[str, NDArray[np.float32]]:
    """What controls, the base first, make of inputs in so many views, all in the first, then all in the second …:
    "features" [N, D], "answers" [K, N, C], and "centre" and "whitening" of the features.

    put: of a view, its inputs some at a time. whitening: of how many components one is made, or the one that there is.
    """
    base = base_of(controls[0], tensors(part_of(next(iter(put(0))), 0, 1)))
    raw = features_of(base, put(0))
    if isinstance(whitening, int):
        whitening = whitening_of(base, raw, whitening)
    others = [whitening(features_of(base, put(view))) for view in range(1, views)]
    return {
        "features": np.concatenate([whitening(raw), *others]),
        "answers": answers_of(controls, chain.from_iterable(map(put, range(views))), classes),
        "centre": whitening.centre,
        "whitening": whitening.matrix,
    }


class Candidates:
    """Inputs of which probes are chosen: the owner's own [n, ...], and as many as these or more made of two of them,
    means, of tokens splices. None of them is there before it is asked for."""

    def __init__(self, rows: NDArray[Any], least: int, ranges: Range) -> None:
        generator, own, made = np.random.default_rng(0), np.arange(len(rows)), max(least, len(rows))
        first, shift = (generator.integers(low, len(rows), made) for low in (0, 1))
        second = (first + shift) % len(rows)
        self._rows, self._ranges, self._tokens = rows, ranges, rows.dtype.kind == "i"
        if self._tokens:  # which are small
            self._rows = np.concatenate([rows, splices(rows, first, second, generator)])
        self._first, self._second = np.concatenate([own, first]), np.concatenate([own, second])

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, places: Any) -> NDArray[Any]:
        """Those at a slice or at places, as levels uint8, tokens as they are."""
        if self._tokens:
            return np.asarray(self._rows[places])
        return to_levels((self._rows[self._first[places]] + self._rows[self._second[places]]) / 2, self._ranges)


def undecided_first(answers: NDArray[np.float32]) -> NDArray[np.int64]:
    """Places of rows in the order in which a network is sure of them, the least sure first; answers [n, C]."""
    shares = np.exp(answers - answers.max(axis=1, keepdims=True))
    best = np.sort(shares / shares.sum(axis=1, keepdims=True), axis=1)[:, -2:]
    return np.argsort(best[:, 1] - best[:, 0], kind="stable")
