"""The thief's own data: inputs, and labels where he has any."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wmengine._optional import require

if TYPE_CHECKING:
    import torch

Inputs = Any  # a torch tensor, or a dict of them by name
NO_BATCHES = (str, bytes, Mapping, np.ndarray)  # which can be iterated over all the same


class Data:
    """What `run` was given as data, one batch after another.

    given: (inputs, labels) or inputs alone, arrays or torch tensors [n, ...], inputs also as a dict of them by name; or
    an iterable of such batches that can be gone through more than once, such as a DataLoader, whose order and sizes
    stay. Raises TypeError for anything else, and ValueError where there are no rows, not a label for each, or what is
    no finite number.
    """

    def __init__(self, given: Any) -> None:
        self._loader: Any = None
        if _is_rows(given):
            given = (given, None)
        if isinstance(given, tuple | list) and len(given) == 2 and _is_rows(given[0]):
            inputs, labels = given
            self._inputs: dict[str, Any] = dict(inputs) if isinstance(inputs, Mapping) else {"": inputs}
            self._labels = labels
            _check(inputs, labels)
            counts = {len(rows) for rows in self._inputs.values()}
            if len(counts) != 1:
                raise ValueError(f"data must hold as many rows in each input, and it has {sorted(counts)}")
            if labels is not None and len(labels) not in counts:
                raise ValueError(f"data has {counts.pop()} inputs and {len(labels)} labels")
        elif hasattr(given, "__iter__") and not hasattr(given, "__next__") and not isinstance(given, NO_BATCHES):
            self._loader = given
            self._labels = self._first()[1]
        else:
            raise TypeError(
                "data is (inputs, labels), inputs alone, or batches of them that can be gone through more than once "
                f"(a DataLoader), and not {type(given).__name__}"
            )

    @property
    def labelled(self) -> bool:
        return self._labels is not None

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Inputs, torch.Tensor | None]]:
        """One epoch, in an order drawn from `generator`; a DataLoader's own batches as they come."""
        torch = require("torch", extra="train")
        if self._loader is not None:
            for inputs, labels in map(_parted, self._loader):
                yield _tensors(inputs), None if labels is None else torch.as_tensor(labels)
            return
        inputs = {name: torch.as_tensor(rows) for name, rows in self._inputs.items()}
        labels = None if self._labels is None else torch.as_tensor(self._labels)
        order = torch.randperm(len(next(iter(inputs.values()))), generator=generator)
        for chosen in order.split(size):
            rows = {name: values[chosen] for name, values in inputs.items()}
            yield rows.get("", rows), None if labels is None else labels[chosen]

    def arrays(self, count: int) -> list[NDArray[Any]] | dict[str, NDArray[Any]]:
        """The first `count` inputs as NumPy arrays: a list of one, or a dict by name."""
        inputs = self._first()[0] if self._loader is not None else self._inputs.get("", self._inputs)
        if isinstance(inputs, Mapping):
            return {name: _array(rows[:count]) for name, rows in inputs.items()}
        return [_array(inputs[:count])]

    def example(self, count: int = 1) -> Inputs:
        """The first `count` inputs as torch tensors."""
        torch = require("torch", extra="train")
        first = self.arrays(count)
        if isinstance(first, dict):
            return {name: torch.from_numpy(rows.copy()) for name, rows in first.items()}
        return torch.from_numpy(first[0].copy())

    def _first(self) -> tuple[Any, Any]:
        torch = sys.modules.get("torch")
        # A DataLoader draws from torch's random numbers, which are the caller's, each time that it begins.
        with nullcontext() if torch is None else torch.random.fork_rng(devices=[]):
            for batch in self._loader:
                return _parted(batch)
        raise ValueError("data has no batches")


def _is_rows(given: Any) -> bool:
    if isinstance(given, Mapping):
        return bool(given) and all(map(_is_rows, given.values()))
    return hasattr(given, "shape") and len(given.shape) > 0


def _parted(batch: Any) -> tuple[Any, Any]:
    parts = (batch,) if _is_rows(batch) else batch
    if not (isinstance(parts, tuple | list) and len(parts) in (1, 2) and _is_rows(parts[0])):
        raise TypeError(f"a batch of data is (inputs, labels) or inputs alone, and not {type(batch).__name__}")
    inputs, labels = (*parts, None)[:2]
    _check(inputs, labels)
    return inputs, labels


def _check(inputs: Any, labels: Any) -> None:
    """Raises ValueError for rows that are no numbers, or not finite."""
    named = inputs if isinstance(inputs, Mapping) else {"": inputs}
    rows = {f"data's input {name}".rstrip(): given for name, given in named.items()}
    for what, given in (rows if labels is None else rows | {"labels": labels}).items():
        values = given if hasattr(given, "dtype") else np.asarray(given)
        floating = values.is_floating_point() if hasattr(values, "is_floating_point") else values.dtype.kind == "f"
        if 0 in (values.shape or (0,)) or getattr(values.dtype, "kind", "") in tuple("USOcMm"):
            raise ValueError(f"{what} must hold rows of numbers, and holds {values.dtype} {list(values.shape)}")
        if floating and not (math.isfinite(values.min()) and math.isfinite(values.max())):
            raise ValueError(f"{what} holds NaN or Inf: give clean rows")


def _tensors(inputs: Any) -> Inputs:
    torch = require("torch", extra="train")
    if isinstance(inputs, Mapping):
        return {name: torch.as_tensor(rows) for name, rows in inputs.items()}
    return torch.as_tensor(inputs)


def _array(rows: Any) -> NDArray[Any]:
    return np.asarray(rows.detach().cpu() if hasattr(rows, "detach") else rows)
