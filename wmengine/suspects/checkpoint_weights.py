"""The weights among a checkpoint's named tensors: composed where their layer computes them, folded where it is known.

Names are used for what only they can tell: which tensors make up one weight, and which normalisation is behind it. The
first such is the one whose tensors come right behind the weight's, as in a state dict; in a file that is sorted by name
it is the one of the same number (conv1, bn1), or the next of a sequence (0, 1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
_RECURRENT = re.compile(r"weight_[ih]h(_l\d+)?")  # a normalisation behind such a layer is of its state
_EPSILON = 1e-5  # torch's own; a checkpoint does not say


@dataclass(frozen=True)
class Entry:
    """A tensor in a checkpoint: its shape, the type that is stored, and what reads it as float32."""

    shape: tuple[int, ...]
    kind: str
    read: Callable[[], Array]


@dataclass(frozen=True)
class Stored:
    """A weight: the path of its layer or its own name, its shape, what is stored, and what reads its values and the
    factors [O] of the normalisation behind it, or None."""

    name: str
    shape: tuple[int, ...]
    kind: str
    read: Callable[[], tuple[Array, Array | None]]


def weights_of(entries: Mapping[str, Entry]) -> list[Stored]:
    """Every tensor of two axes and more that may be a weight, in the order of the entries."""
    parts: set[str] = set()
    weights: dict[str, Entry] = {}
    for name, entry in entries.items():
        for suffixes, compose in _COMPOSED:
            stem = name.removesuffix(suffixes[0])
            made_of = [f"{stem}{suffix}" for suffix in suffixes]
            if name.endswith(suffixes[0]) and all(part in entries for part in made_of):
                read = partial(_compose, compose, [entries[part] for part in made_of])
                weights[f"{stem}weight"] = Entry(entry.shape, entry.kind, read)
                parts.update(made_of)
                break
        else:
            weights[name] = entry
    weights = {name: each for name, each in weights.items() if name not in parts and len(each.shape) > 1}
    layers = {_path(name): each.shape[0] for name, each in weights.items() if not _RECURRENT.search(name)}
    behind = _normalisations(entries, layers)
    return [
        Stored(name, each.shape, each.kind, partial(_folded, each, entries, behind.get(_path(name))))
        for name, each in weights.items()
        if 0 not in each.shape
    ]


def _path(name: str) -> str:
    return name.rpartition(".")[0]


def _compose(compose: Callable[..., Any], parts: list[Entry]) -> Array:
    return np.asarray(compose(*(part.read() for part in parts)), np.float32)


def _normed(direction: Array, length: Array) -> Any:
    along = tuple(axis for axis in range(direction.ndim) if length.ndim == 0 or length.shape[axis] == 1)
    return direction * (length / np.sqrt(np.square(direction).sum(along, keepdims=True)))


def _spectral(weight: Array, left: Array, right: Array) -> Any:
    rows = weight if len(left) == len(weight) else weight.swapaxes(0, 1)  # a transposed convolution's filters
    return weight / (left @ rows.reshape(len(left), -1) @ right)


# Suffixes of the tensors that make up a weight, the first of its shape, and how they do: torch's weight_norm,
# spectral_norm and pruning.
_COMPOSED: tuple[tuple[tuple[str, ...], Callable[..., Any]], ...] = (
    (("weight_v", "weight_g"), _normed),
    (("parametrizations.weight.original1", "parametrizations.weight.original0"), _normed),
    (("weight_orig", "weight_u", "weight_v"), _spectral),
    (
        ("parametrizations.weight.original", "parametrizations.weight.0._u", "parametrizations.weight.0._v"),
        _spectral,
    ),
    (("weight_orig", "weight_mask"), np.multiply),
)


def _normalisations(entries: Mapping[str, Entry], layers: Mapping[str, int]) -> dict[str, str]:
    """The path of the normalisation behind each layer that has one, both of as many filters."""
    norms = {
        _path(name): each.shape[0]
        for name, each in entries.items()
        if name.endswith("running_var") and len(each.shape) == 1
    }
    behind: dict[str, str] = {}
    last = None
    for path in dict.fromkeys(map(_path, entries)):
        if path in norms and last is not None and layers[last] == norms[path]:
            behind[last] = path
        last = path if path in layers else None
    left = norms.keys() - behind.values()
    numbered: dict[tuple[Any, ...], list[str]] = {}
    for path in left:
        numbered.setdefault((*_numbered(path), norms[path]), []).append(path)
    for layer in layers.keys() - behind:
        parent, number = _numbered(layer)
        found = numbered.get((parent, number + 1 if isinstance(number, int) else number, layers[layer]), [])
        if len(found) == 1:
            behind[layer] = found[0]
    return behind


def _numbered(path: str) -> tuple[str, int | str]:
    """Where a module is, and its number: the place in a sequence, or what its own name ends in ("1" of "conv1")."""
    parent, _, own = path.rpartition(".")
    if re.fullmatch(r"\d{1,9}", own, re.ASCII):
        return parent, int(own)
    return parent, own[len(own.rstrip("0123456789")) :]


def _folded(entry: Entry, entries: Mapping[str, Entry], norm: str | None) -> tuple[Array, Array | None]:
    values = np.ascontiguousarray(entry.read())
    if norm is None:
        return values, None
    with np.errstate(invalid="ignore", divide="ignore"):
        factors = 1 / np.sqrt(entries[f"{norm}.running_var"].read() + np.float32(_EPSILON))
    scale = entries.get(f"{norm}.weight")
    return values, np.asarray(factors if scale is None else factors * scale.read(), np.float32)
