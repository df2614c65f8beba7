"""Numerical operators: a NumPy array runs on the compiled CPU kernels, a torch tensor through torch's dispatcher.

Each has a reference in :mod:`wmengine.ops.reference`. A `key` is an int, 0 ≤ key < 2⁶⁴; `total` is a number of symbols.
This module imports NumPy only; :func:`embedding_loss`, :func:`marked_cross_entropy` and
:func:`marked_linear_cross_entropy` are for training and need torch.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from wmengine import _cpu
from wmengine._optional import missing
from wmengine.ops import cpu
from wmengine.ops.cpu import carrier_projection, check_count

if TYPE_CHECKING:
    from wmengine.ops.torch_ops import (
        MarkedCrossEntropy,
        embedding_loss,
        marked_cross_entropy,
        marked_linear_cross_entropy,
    )

__all__ = [
    "MarkedCrossEntropy",
    "carrier_projection",
    "embedding_loss",
    "get_num_threads",
    "marked_cross_entropy",
    "marked_linear_cross_entropy",
    "match_counts",
    "project",
    "project_adjoint",
    "set_num_threads",
    "sketch",
    "sketch_adjoint",
]

_TRAINING = ("MarkedCrossEntropy", "embedding_loss", "marked_cross_entropy", "marked_linear_cross_entropy")


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _front(value: Any) -> Any:
    """The module that serves `value`; torch's is imported only once a tensor has shown that torch is there."""
    if not _is_tensor(value):
        return cpu
    from wmengine.ops import torch_ops

    return torch_ops


def sketch(values: Any, key: int, total: int) -> Any:
    """Keyed sketch w[M] → y[total]: y_t = √(P/M) Σ_{bucket(m)=t} σ(m) w_m, P = `total` padded to a power of two ≥ 32.

    One sign and one bucket for each weight, drawn by Philox from `key` as ``docs/design.md`` states; differentiable.
    Raises TypeError or ValueError naming the argument.
    """
    return _front(values).sketch(values, key, total)


def sketch_adjoint(gradient: Any, key: int, count: int) -> Any:
    """The transpose of :func:`sketch`: g[total] → [count]."""
    return _front(gradient).sketch_adjoint(gradient, key, count)


def project(values: Any, key: int, total: int, kind: str = "rademacher") -> Any:
    """Dense keyed projection w[M] → y[total] = X·w / √M, X ``rademacher`` or ``gaussian`` and never stored."""
    return _front(values).project(values, key, total, kind)


def project_adjoint(gradient: Any, key: int, count: int, kind: str = "rademacher") -> Any:
    """The transpose of :func:`project`: g[total] → [count]."""
    return _front(gradient).project_adjoint(gradient, key, count, kind)


def match_counts(outputs: Any, expected: Any) -> Any:
    """Count the rows of outputs[S, N, C] whose argmax is expected[K, N] → (counts int32[S, K], invalid int32[S]).

    A row that holds NaN or Inf never matches and is counted as invalid; ties go to the lowest class. CUDA tensors are
    counted on their device.
    """
    return _front(outputs).match_counts(outputs, expected)


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
