"""`match_counts`: the class and the levels of all marks' rows of a suspect, against one read of the scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.harness import COPYING, Aim, Case, Contender, compiled
from wmengine import ops

GROUP = 16  # rows of a mark in one look


class Size(NamedTuple):
    """Rows of scores for so many classes, or of probabilities: 16 rows are the first look of one mark."""

    rows: int
    classes: int
    probabilities: bool = False


SIZES = [Size(16_000, 10), Size(1600, 10), Size(16, 10), Size(6400, 1000)]
GPU_SIZES = [
    Size(4_000_000, 10),
    Size(65_536, 1000),
    Size(65_536, 1000, probabilities=True),
    Size(1024, 128_256),
]
QUICK_SIZES = [Size(32, 10), Size(8, 100)]
NUMPY = "NumPy argmax, gather and standardisation"
AIMS = {size: [Aim(NUMPY, 2.0)] for size in (SIZES[0], SIZES[3])}


def numpy_levels(outputs: NDArray[np.float32], expected: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
    """(hits of each mark, level of the expected class [N], histogram [N, 61]); for scores that are finite logits."""
    hits = (outputs.argmax(axis=1) == expected).reshape(-1, min(GROUP, len(outputs))).sum(axis=1)
    mean, deviation = outputs.mean(axis=1, keepdims=True), outputs.std(axis=1, keepdims=True)
    levels = np.clip(np.rint(10 * (outputs - mean) / deviation), -30, 30).astype(np.int64)
    at = np.take_along_axis(levels, expected[:, None], axis=1)[:, 0]
    places = levels + 30 + 61 * np.arange(len(levels))[:, None]
    return hits, at, np.bincount(places.ravel(), minlength=61 * len(levels)).reshape(-1, 61)


def torch_levels(outputs: Tensor, expected: Tensor) -> tuple[Tensor, ...]:
    """The same of tensors."""
    hits = (outputs.argmax(dim=1) == expected).view(-1, min(GROUP, len(outputs))).sum(dim=1)
    deviation, mean = torch.std_mean(outputs, dim=1, correction=0, keepdim=True)
    levels = (10 * (outputs - mean) / deviation).round().clamp(-30, 30).long()
    at = levels.gather(1, expected[:, None])[:, 0]
    ones = torch.ones_like(levels, dtype=torch.int32)
    histogram = torch.zeros(len(levels), 61, dtype=torch.int32, device=outputs.device)
    return hits, at, histogram.scatter_add_(1, levels + 30, ones)


def test_match_counts(size: Size, compare: Callable[[Case], None], device: str) -> None:
    torch.manual_seed(1)
    scores = torch.randn(size.rows, size.classes, device=device)
    outputs = scores.softmax(dim=1) if size.probabilities else scores
    expected = torch.randint(0, size.classes, (size.rows,), device=device)
    group = torch.arange(size.rows, device=device) // GROUP
    array, labels, marks = (tensor.cpu().numpy() for tensor in (outputs, expected, group))
    inputs: tuple[Any, ...] = (array, labels, marks) if device == "cpu" else (outputs, expected, group)
    groups = -(-size.rows // GROUP)
    copy = torch.empty_like(outputs)

    def ours() -> ops.MatchCounts:
        found: ops.MatchCounts = ops.match_counts(*inputs, groups)
        return found

    def by_torch() -> tuple[Tensor, ...]:
        return torch_levels(outputs.log() if size.probabilities else outputs, expected)

    _, levels, counted, right, invalid = (torch.as_tensor(part).to(device) for part in ours()[:5])
    hits, at, histogram = by_torch()
    assert torch.equal(right.long(), hits)
    assert not invalid.any()
    assert (levels.long() - at).abs().max() <= 1  # float32's rounding
    assert (counted.long() - histogram).abs().sum() <= 0.001 * outputs.numel()

    opponents = [Contender("torch argmax, gather and standardisation", by_torch)]
    left_out = {}
    if device == "cpu":
        opponents.insert(0, Contender(NUMPY, lambda: numpy_levels(array, labels)))
    else:
        fused = compiled(by_torch)
        opponents.append(Contender("torch.compile", lambda: fused(), may_fail=True))
        left_out[NUMPY] = "the scores are on the GPU"
    compare(
        Case(
            operator="match_counts",
            what=f"match_counts, C={size.classes}" + ", probabilities" * size.probabilities,
            size=f"{size.rows} × {size.classes}",
            bytes_moved=outputs.numel() * 4,
            ours=ours,
            floor=Contender("copy", lambda: copy.copy_(outputs)),
            peers=opponents,
            left_out=left_out,
            aims=AIMS.get(size, []),
            headline=size in (SIZES[0], SIZES[3]),
            gpu_bound=COPYING,
            operations=outputs.numel(),
            axis=("rows", size.rows),
        )
    )
