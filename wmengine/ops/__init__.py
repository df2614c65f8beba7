"""Numerical operators: a NumPy array runs on the compiled CPU kernels, a torch tensor through torch's dispatcher.

Each has a reference in :mod:`wmengine.ops.reference`. A `key` is an int, 0 ≤ key < 2⁶⁴; `total` is a number of symbols.
This module imports NumPy only; the losses are for training and need torch.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from wmengine._optional import missing, not_compiled

try:
    from wmengine import _cpu
except ImportError as error:
    raise not_compiled(error) from error
from wmengine.ops import cpu
from wmengine.ops.cpu import carrier_projection, check_choice, check_count
from wmengine.ops.matches import PackedBits
from wmengine.ops.reference import PROJECTIONS, MatchCounts

if TYPE_CHECKING:
    from wmengine.ops.torch_ops import (
        MarkedCrossEntropy,
        embedding_loss,
        marked_cross_entropy,
        soft_nearest_neighbor,
    )

__all__ = [
    "MarkedCrossEntropy",
    "MatchCounts",
    "PackedBits",
    "bit_matches",
    "carrier_projection",
    "embedding_loss",
    "get_num_threads",
    "label_matches",
    "marked_cross_entropy",
    "match_counts",
    "pack_bits",
    "project",
    "project_adjoint",
    "set_num_threads",
    "sketch",
    "sketch_adjoint",
    "soft_nearest_neighbor",
]

_TRAINING = ("MarkedCrossEntropy", "embedding_loss", "marked_cross_entropy", "soft_nearest_neighbor")


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _front(value: Any) -> Any:
    """The module that serves `value`; torch's is imported only once a tensor has shown that torch is there."""
    if not _is_tensor(value):
        return cpu
    from wmengine.ops import torch_ops

    return torch_ops


def _dense(kind: str) -> str:
    return check_choice("kind", kind, PROJECTIONS[1:])


def sketch(values: Any, key: int, total: int) -> Any:
    """Keyed sketch w[M] → y[total]: y_t = √(P/M) Σ_{bucket(m)=t} σ(m) w_m, P = `total` padded to a power of two ≥ 32.

    One sign and one bucket for each weight, drawn by Philox from `key` as ``docs/design.md`` states; differentiable.
    Raises TypeError or ValueError naming the argument.
    """
    return _front(values).project(values, key, total, "sketch")


def sketch_adjoint(gradient: Any, key: int, count: int) -> Any:
    """The transpose of :func:`sketch`: g[total] → [count]."""
    return _front(gradient).project_adjoint(gradient, key, count, "sketch")


def project(values: Any, key: int, total: int, kind: str = "rademacher") -> Any:
    """Dense keyed projection w[M] → y[total] = X·w / √M, X ``rademacher`` or ``gaussian`` and never stored."""
    return _front(values).project(values, key, total, _dense(kind))


def project_adjoint(gradient: Any, key: int, count: int, kind: str = "rademacher") -> Any:
    """The transpose of :func:`project`: g[total] → [count]."""
    return _front(gradient).project_adjoint(gradient, key, count, _dense(kind))


def match_counts(outputs: Any, expected: Any, group: Any = None, groups: int = 1, *, levels: bool = False) -> Any:
    """The class of each row of outputs[N, C], how far its classes stand out, and the expected ones counted by group.

    outputs: float32, float16, bfloat16 (of torch) or float64. expected: integers [N]; what is not in 0..C−1 matches
    nothing. group: integers [N], 0 ≤ group < groups, or None where all rows are of group 0. Returns
    :class:`wmengine.ops.MatchCounts`, `levels` int8[N, C] with it only where they are asked for.

    A row is invalid that holds NaN or +Inf, or nothing above −Inf. Others name the class of their highest score, the
    first of equals. With z the scores, or their logarithms where none is negative and they add up to 1 within 10⁻³, and
    μ and σ the mean and deviation of those above −Inf, the level of class c is 10 (z_c − μ)/σ, rounded, from −30 to 30;
    −30 where z_c is −Inf, and else 0 where σ ≤ 10⁻¹² max |z|. A level may differ by 1 between devices where it falls on
    an edge of rounding. Raises TypeError or ValueError naming the argument; CUDA tensors are counted on their device,
    where a group that is none counts nowhere.
    """
    return _front(outputs).match_counts(outputs, expected, group, groups, levels=levels)


def label_matches(predicted: Any, expected: Any) -> Any:
    """Count the places where predicted[S, N] is expected[K, N] → int32[S, K], without the S × K × N comparisons.

    Both hold integers. A negative label abstains: on either side it matches nothing, not even itself. Raises TypeError
    or ValueError naming the argument. CUDA tensors are counted on their device.

        agreement = label_matches(predicted, predicted)  # of every two networks
    """
    return _front(predicted).label_matches(predicted, expected)


def pack_bits(bits: Any) -> PackedBits:
    """Bits [rows, T], bool or uint8 of 0 and 1, packed eight a byte: for a registry that is compared again and again.

    The bytes are those of ``numpy.packbits(bits, axis=-1, bitorder="little")``: bit t of a row is bit t % 8 of byte
    t // 8. Rows that are packed so already go in as ``PackedBits(data, total)``. Raises TypeError or ValueError.
    """
    packed: PackedBits = _front(bits).pack_bits(bits)
    return packed


def bit_matches(messages: Any, registry: Any, best: int | None = None) -> Any:
    """Count the equal bits of messages[S, T] and registry[K, T] → int32[S, K].

    With `best`, 1 ≤ best ≤ K: (counts int32[S, best], indices int64[S, best]) of the registry rows that match each
    message best, most matches first and ties to the lowest row; counts of all pairs are never held. Either argument is
    an array of 0 and 1 (bool or uint8) or what :func:`pack_bits` made of one. Raises TypeError or ValueError naming the
    argument. CUDA tensors are counted on their device, which takes `best` up to 1024 and T up to 2²³ − 1 and raises
    ValueError beyond; without bits (T = 0) all rows are tied.

        registry = pack_bits(bits)
        counts, rows = bit_matches(read, registry, best=10)
    """
    data = messages.data if isinstance(messages, PackedBits) else messages
    return _front(data).bit_matches(messages, registry, best)


def __getattr__(name: str) -> Any:
    if name not in _TRAINING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from wmengine.ops import torch_ops
    except ModuleNotFoundError as error:
        raise missing(error) from error
    globals()[name] = value = getattr(torch_ops, name)
    return value


def set_num_threads(count: int) -> None:
    """Use at most `count` threads in each CPU operator; results do not depend on it."""
    _cpu.set_thread_count(check_count("count", count))


def get_num_threads() -> int:
    """Threads that a CPU operator may use."""
    return int(_cpu.thread_count())
