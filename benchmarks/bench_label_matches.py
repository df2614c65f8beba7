"""`label_matches`: labels of S suspects against K label sets, against reading both and writing the counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import COPYING, QUICK_REASON, Aim, Case, Contender, compiled
from wmengine import ops


class Size(NamedTuple):
    """Labels that `suspects` networks give to `triggers` inputs, and those that `label_sets` watermarks expect."""

    suspects: int
    label_sets: int
    triggers: int
    classes: int


SIZES = [
    Size(1000, 1000, 100, 10),
    Size(1000, 1000, 100, 1000),
    Size(1000, 1, 100, 10),
    Size(1000, 10, 100, 10),
    Size(1000, 100, 100, 10),
    Size(1000, 5000, 100, 10),
]
GPU_SIZES = [Size(10_000, 10_000, 100, 10)]
QUICK_SIZES = [Size(8, 5, 40, 10), Size(4, 3, 100, 1000)]
BROADCAST, ROWS = "NumPy broadcast", "NumPy, set by set"
GEMM = "one-hot GEMM"
LARGEST = 256 << 20  # bytes that a peer may hold beside its inputs
AIMS = {SIZES[0]: [Aim(BROADCAST, 30.0), Aim(GEMM, 3.0)], SIZES[1]: [Aim(BROADCAST, 30.0)]}


def broadcast_counts(predicted: Tensor, expected: Tensor) -> Tensor:
    """int64[S, K]."""
    return (predicted[:, None, :] == expected[None]).sum(dim=-1)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """float32[rows, N · C]."""
    return torch.nn.functional.one_hot(labels, classes).flatten(1).float()


def test_label_matches(size: Size, compare: Callable[[Case], None], device: str, quick: bool) -> None:
    torch.manual_seed(1)
    predicted = torch.randint(0, size.classes, (size.suspects, size.triggers), device=device)
    expected = torch.randint(0, size.classes, (size.label_sets, size.triggers), device=device)
    left, right = predicted.cpu().numpy(), expected.cpu().numpy()
    inputs: tuple[Any, Any] = (left, right) if device == "cpu" else (predicted, expected)
    room = torch.empty(size.suspects, size.label_sets, dtype=torch.int32, device=device)
    pairs = size.suspects * size.label_sets

    def rows(some: slice = slice(None)) -> np.ndarray:
        return np.stack([(left == labels).sum(axis=-1) for labels in right[some]], axis=1)

    some = slice(max(1, LARGEST // (64 * left.size)))  # of the label sets: what NumPy counts in a second
    counts = torch.as_tensor(ops.label_matches(*inputs)).cpu().numpy()
    assert np.array_equal(counts[:, some], rows(some))

    opponents, left_out = [], {}
    if device == "cpu":
        opponents.append(Contender(ROWS, rows))
        if pairs * size.triggers <= LARGEST:
            opponents.append(
                Contender(BROADCAST, lambda: (left[:, None] == right[None]).sum(axis=-1), holds=pairs * size.triggers)
            )
        else:
            left_out[BROADCAST] = "holds S × K × N bytes"
    else:
        left_out[ROWS] = left_out[BROADCAST] = "the labels are on the GPU"
    if 4 * size.triggers * size.classes * (size.suspects + size.label_sets) <= LARGEST:
        hot, hot_expected = one_hot(predicted, size.classes), one_hot(expected, size.classes).T
        held = 4 * (hot.numel() + hot_expected.numel())
        opponents.append(Contender(GEMM, lambda: torch.mm(hot, hot_expected), holds=held))  # made beforehand
    else:
        left_out[GEMM] = "the one-hot labels hold N × C numbers a row"
    if pairs * size.triggers <= LARGEST:
        opponents.append(Contender("torch broadcast", lambda: broadcast_counts(predicted, expected)))
    if quick:
        left_out["torch.compile"] = QUICK_REASON
    else:
        fused = compiled(broadcast_counts)
        opponents.append(Contender("torch.compile", lambda: fused(predicted, expected), may_fail=True))
    compare(
        Case(
            operator="label_matches",
            what=f"label_matches, C={size.classes}",
            size=f"{size.suspects} × {size.label_sets} × {size.triggers}",
            bytes_moved=8 * (predicted.numel() + expected.numel()) + 4 * pairs,
            ours=lambda: ops.label_matches(*inputs),
            floor=Contender("read and write", lambda: (predicted.sum(), expected.sum(), room.fill_(1))),
            peers=opponents,
            left_out=left_out,
            aims=AIMS.get(size, []),
            headline=size == SIZES[0],
            gpu_bound=COPYING,
            operations=pairs * size.triggers,
            axis=("label sets", size.label_sets),
        )
    )
