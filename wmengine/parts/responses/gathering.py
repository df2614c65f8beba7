"""The material of `response`, made before there is a bit: the base's features of probes, and the controls' answers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from wmengine.errors import SuspectError
from wmengine.parts.responses.pattern import CLIP
from wmengine.parts.responses.reading import log_probabilities
from wmengine.parts.responses.tokens import splices
from wmengine.suspects import open_suspect
from wmengine.suspects.adapters import Range, to_levels
from wmengine.suspects.base import Inputs, Suspect, part_of, rows_of
from wmengine.suspects.weights import call, module_tensors

Tensors = Mapping[str, torch.Tensor]

POOLED = 4  # a side of inputs of which only pooled pixels are known
COUNTED = 64  # remainders by which tokens are counted of which nothing else is known
_STEP = 2.0**-8  # to which the controls' answers are rounded
_MOST_RAW = 8192
_CHUNK = 256


@runtime_checkable
class Base(Protocol):
    """Where features come from. both: of inputs [n, ...] by name raw features [n, F], and what the network answers."""

    def both(self, inputs: Tensors) -> tuple[torch.Tensor, Any]: ...


class ModuleBase:
    """A torch module: what goes into the weight that runs last, in a copy of its own, in eval mode, without gradients.
    Threads may share it.

    Raises ValueError for a module that runs through no weight.
    """

    def __init__(self, model: torch.nn.Module, example: Tensors) -> None:
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        floats = (each for each in self._model.parameters() if each.is_floating_point())
        self._like = next(floats, torch.empty(0))
        weights = module_tensors(self._model, self._placed(example))
        if not weights:
            raise ValueError("its features are those of a network's last layer, and this network runs through none")
        self._seen: dict[int, torch.Tensor] = {}  # by thread
        self._model.get_submodule(weights[-1].path).register_forward_pre_hook(self._keep, with_kwargs=True)

    def both(self, inputs: Tensors) -> tuple[torch.Tensor, Any]:
        with torch.no_grad():
            answered = call(self._model, self._placed(inputs))
        answered = getattr(answered, "logits", answered)  # as models of transformers answer
        return self._seen.pop(threading.get_ident()).flatten(1).float(), answered

    def _placed(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        """Copies, as the model may write into them: floats in its own type, on its device."""
        device, dtype = self._like.device, self._like.dtype
        return {
            name: rows.detach().to(device, dtype if rows.is_floating_point() else rows.dtype, copy=True)
            for name, rows in inputs.items()
        }

    def _keep(self, _: torch.nn.Module, given: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        self._seen[threading.get_ident()] = [*given, *named.values()][0]


class FunctionBase:
    """A function of which nothing but answers is known: pictures pooled to 4 x 4, how many tokens of a row leave which
    remainder by 64, other inputs as they are."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def both(self, inputs: Tensors) -> tuple[torch.Tensor, Any]:
        given = {name: rows.detach().cpu() for name, rows in inputs.items()}
        given = {name: rows.float() if rows.is_floating_point() else rows for name, rows in given.items()}
        raw, *_ = given.values()
        if not raw.is_floating_point():
            raw = torch.nn.functional.one_hot(raw.long() % COUNTED, COUNTED).sum(1).float()
        elif raw.ndim == 4:
            raw = torch.nn.functional.adaptive_avg_pool2d(raw, POOLED)
        copies = {name: rows.numpy().copy() for name, rows in given.items()}
        return raw.flatten(1), self._function(copies if len(copies) > 1 else next(iter(copies.values())))


def base_of(network: Any, example: Tensors) -> Base:
    """The source of a network's features; example: [1, ...] by name."""
    if isinstance(network, torch.nn.Module):
        return ModuleBase(network, example)
    return network if isinstance(network, Base) else FunctionBase(network)


@dataclass(frozen=True, eq=False)
class Whitening:
    """From raw features [n, F] to features: (raw − centre) @ matrix, cut off at ±3."""

    centre: NDArray[np.float32]
    matrix: NDArray[np.float32]

    def __call__(self, raw: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(((raw - self.centre) @ self.matrix).clip(-CLIP, CLIP), np.float32)


def tensors(inputs: Inputs) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(rows) for name, rows in inputs.items()}


def features_of(base: Base, parts: Iterable[Inputs]) -> NDArray[np.float32]:
    """Raw features [n, F] of inputs, some at a time. Raises ValueError where these are too many or no numbers."""
    found = []
    for inputs in parts:
        for at in range(0, rows_of(inputs), _CHUNK):
            found.append(base.both(tensors(part_of(inputs, at, at + _CHUNK)))[0].cpu().numpy())
            if found[-1].shape[1] > _MOST_RAW:
                raise ValueError(
                    f"the base's last layer takes {found[-1].shape[1]} numbers, and features are of at most "
                    f"{_MOST_RAW}: give a control with a smaller one first"
                )
    raw = np.concatenate(found)
    if not np.isfinite(raw).all():
        raise ValueError("the base's features hold NaN or Inf")
    return raw


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
