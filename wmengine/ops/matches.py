"""Symbols compared all with all on the CPU: labels with labels, bit strings with bit strings; NumPy only.

Bits are packed as ``numpy.packbits(bits, axis=-1, bitorder="little")`` packs them: bit t is bit t % 8 of byte t // 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wmengine import _cpu

Counts = NDArray[np.int32]
Indices = NDArray[np.int64]
Bytes = NDArray[np.uint8]

# Codes of labels are 32 bits wide, and two of them stand for the abstaining of either side.
_LARGEST_LABEL = 2**31 - 4


def plain(array: NDArray[Any], dtype: Any = None) -> NDArray[Any]:
    """The array as compiled code reads it: contiguous and aligned, a copy only where it is neither."""
    if array.flags.c_contiguous and array.flags.aligned and dtype in (None, array.dtype):
        return array  # at once: a look has few rows
    return np.require(array, dtype, ["C", "A"])


@dataclass(frozen=True, eq=False)
class PackedBits:
    """Rows of `total` bits, eight a byte: what :func:`wmengine.ops.pack_bits` returns.

    data: uint8[rows, ceil(total / 8)], a NumPy array or a torch tensor; bit t of a row is bit t % 8 of byte t // 8, and
    the last byte is filled up with zeros. Raises TypeError or ValueError where `data` is not that.
    """

    data: Any
    total: int

    def __post_init__(self) -> None:
        if not str(getattr(self.data, "dtype", "")).endswith("uint8"):
            kind = getattr(self.data, "dtype", type(self.data).__name__)
            raise TypeError(f"data must be a uint8 array or tensor, not {kind}; pack_bits makes one of bits")
        if isinstance(self.total, bool) or not isinstance(self.total, (int, np.integer)) or self.total < 0:
            raise ValueError(f"total must be an int of at least 0, not {self.total!r}")
        width = (int(self.total) + 7) // 8
        if self.data.ndim != 2 or self.data.shape[1] != width:
            raise ValueError(f"data must be [rows, {width}] for {self.total} bits, not {tuple(self.data.shape)}")

    def __len__(self) -> int:
        return int(self.data.shape[0])


def check_bits(name: str, bits: Any) -> Any:
    """An array of [rows, T] bool or uint8; TypeError or ValueError naming the argument otherwise."""
    if bits.ndim != 2:
        raise ValueError(f"{name} must be [rows, bits], not shape {tuple(bits.shape)}")
    if not str(bits.dtype).endswith(("bool", "uint8")):
        raise TypeError(f"{name} must be bool, uint8 of 0 and 1, or packed by pack_bits, not {bits.dtype}")
    return bits


def check_integers(name: str, labels: Any) -> None:
    """TypeError naming the argument unless the array or tensor holds integers."""
    kind = getattr(labels.dtype, "kind", "")  # NumPy's tells at once, and a look has few rows
    if kind not in ("i", "u") and not str(labels.dtype).startswith(("torch.int", "torch.uint")):
        raise TypeError(f"{name} must hold integers, not {labels.dtype}")


def check_labels(predicted: Any, expected: Any) -> None:
    """TypeError or ValueError unless the two hold integers, [S, N] and [K, N]."""
    check_integers("predicted", predicted)
    check_integers("expected", expected)
    if predicted.ndim != 2 or expected.ndim != 2 or predicted.shape[1] != expected.shape[1]:
        shapes = f"{tuple(predicted.shape)} and {tuple(expected.shape)}"
        raise ValueError(f"predicted must be [S, N] and expected [K, N], not {shapes}")


def check_best(best: int, rows: int) -> int:
    """`best` as an int, 1 ≤ best ≤ rows; TypeError or ValueError otherwise."""
    if isinstance(best, bool) or not isinstance(best, (int, np.integer)):
        raise TypeError(f"best must be an int, not {type(best).__name__}")
    if not 1 <= best <= rows:
        raise ValueError(f"best must be between 1 and the registry's {rows} rows, not {best}")
    return int(best)


def check_totals(messages: PackedBits, registry: PackedBits) -> None:
    """ValueError unless the rows of both are as long."""
    if messages.total != registry.total:
        raise ValueError(f"messages hold {messages.total} bits a row, and registry {registry.total}")


def pack_bits(bits: ArrayLike, name: str = "bits") -> PackedBits:
    """[rows, T] of 0 and 1, eight a byte. See :func:`wmengine.ops.pack_bits`."""
    array = check_bits(name, np.asarray(bits))
    if array.dtype == np.uint8 and array.size and array.max() > 1:
        raise ValueError(f"{name} must hold 0 and 1 only; packed bytes go in as PackedBits(data, total)")
    # Packing keeps the order of the array in memory, which may be by columns.
    packed = np.ascontiguousarray(np.packbits(array, axis=-1, bitorder="little"))
    return PackedBits(packed, int(array.shape[1]))


def label_matches(predicted: ArrayLike, expected: ArrayLike) -> Counts:
    """int32[S, K] of places where predicted[S, N] is expected[K, N]. See :func:`wmengine.ops.label_matches`."""
    left, right = np.asarray(predicted), np.asarray(expected)
    check_labels(left, right)
    narrow = all(labels.dtype.itemsize <= 4 and labels.dtype != np.uint32 for labels in (left, right))
    if np.uint64 in (left.dtype, right.dtype):
        left, right, narrow = *_renamed(left, right), False
    left, right = (plain(labels, np.int32 if narrow else np.int64) for labels in (left, right))
    largest = _largest(left, right)
    if largest > _LARGEST_LABEL:
        left, right = _renamed(left, right)
        narrow, largest = False, _largest(left, right)
    counts = np.empty((left.shape[0], right.shape[0]), dtype=np.int32)
    _cpu.label_matches(
        left.ctypes.data,
        left.shape[0],
        right.ctypes.data,
        right.shape[0],
        left.shape[1],
        not narrow,
        largest,
        counts.ctypes.data,
    )
    return counts


def _largest(left: NDArray[Any], right: NDArray[Any]) -> int:
    # A label that one side lacks matches nothing, so the smaller of the two bounds would do; both are the plainer rule.
    return max(int(labels.max(initial=-1)) for labels in (left, right))


def _renamed(left: NDArray[Any], right: NDArray[Any]) -> tuple[Indices, Indices]:
    """Labels of 32 bits and more as ranks among those that occur, negative ones as −1."""
    # Compared as uint64, which holds every label that is not negative: NumPy would compare mixed signs as float64.
    present = [labels >= 0 for labels in (left, right)]
    labels = [np.where(here, given, 0).astype(np.uint64) for given, here in zip((left, right), present, strict=True)]
    known = np.unique(labels[1][present[1]])
    if not known.size:
        return np.full(left.shape, -1, dtype=np.int64), np.full(right.shape, -1, dtype=np.int64)
    ranks = [np.minimum(np.searchsorted(known, each), known.size - 1) for each in labels]
    left_rank, right_rank = (
        np.where(here & (known[rank] == each), rank, -1).astype(np.int64)
        for each, here, rank in zip(labels, present, ranks, strict=True)
    )
    return left_rank, right_rank


def bit_matches(
    messages: ArrayLike | PackedBits, registry: ArrayLike | PackedBits, best: int | None = None
) -> Counts | tuple[Counts, Indices]:
    """Equal bits of each message and each registry row. See :func:`wmengine.ops.bit_matches`."""
    left, right = _as_packed("messages", messages), _as_packed("registry", registry)
    check_totals(left, right)
    sizes = left.data.ctypes.data, len(left), right.data.ctypes.data, len(right), left.total
    if best is None:
        counts = np.empty((len(left), len(right)), dtype=np.int32)
        _cpu.bit_matches(*sizes, counts.ctypes.data)
        return counts
    best = check_best(best, len(right))
    counts, indices = np.empty((len(left), best), dtype=np.int32), np.empty((len(left), best), dtype=np.int64)
    _cpu.best_bit_matches(*sizes, best, counts.ctypes.data, indices.ctypes.data)
    return counts, indices


def _as_packed(name: str, bits: Any) -> PackedBits:
    """Contiguous packed rows on the CPU, whose last byte holds nothing beyond `total`."""
    if not isinstance(bits, PackedBits):
        return pack_bits(bits, name)
    data = np.ascontiguousarray(bits.data)  # bytes are always aligned
    if bits.total % 8 and data.size and (data[:, -1] >> (bits.total % 8)).any():
        raise ValueError(f"{name} holds bits beyond the {bits.total} of a row")
    return PackedBits(data, int(bits.total))
