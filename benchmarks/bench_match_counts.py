"""`match_counts`: argmax, compare with K label sets and count, against one read of the answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import QUICK_REASON, Aim, Case, Contender, compiled
from wmengine import ops


class Size(NamedTuple):
    """Answers of `suspects` networks to `triggers` inputs, compared with `label_sets` watermarks."""

    suspects: int
    triggers: int
    classes: int
    label_sets: int


SIZES = [
    Size(1000, 100, 10, 1),
    Size(1000, 100, 10, 32),
    Size(64, 512, 1000, 1),
    Size(64, 512, 1000, 32),
    Size(1, 100, 10, 1),
    Size(10, 100, 10, 1),
    Size(100, 100, 10, 1),
    Size(10_000, 100, 10, 1),
]
QUICK_SIZES = [Size(8, 16, 10, 1), Size(4, 8, 100, 3)]
NUMPY = "NumPy argmax and compare"
AIMS = {
    SIZES[0]: [Aim(NUMPY, 10.0), Aim("read", 3.0)],
    SIZES[2]: [Aim(NUMPY, 1.5), Aim("read", 1.3)],
    SIZES[3]: [Aim("read", 1.3)],
}


def numpy_counts(outputs: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """int64[S, K]; does not look for NaN."""
    predicted = outputs.argmax(axis=-1)
    return np.stack([(predicted == labels).sum(axis=-1) for labels in expected], axis=1)


def torch_counts(outputs: Tensor, expected: Tensor) -> Tensor:
    """int64[S, K]; does not look for NaN."""
    return (outputs.argmax(dim=-1)[:, None, :] == expected[None]).sum(dim=-1)


def test_match_counts(size: Size, compare: Callable[[Case], None], device: str, quick: bool) -> None:
    torch.manual_seed(1)
    outputs = torch.randn(size.suspects, size.triggers, size.classes, device=device)
    expected = torch.randint(0, size.classes, (size.label_sets, size.triggers), device=device)
    array, labels = outputs.cpu().numpy(), expected.cpu().numpy()

    def ours() -> tuple[Any, Any]:
        counts, invalid = ops.match_counts(*((array, labels) if device == "cpu" else (outputs, expected)))
        return counts, invalid

    counts, invalid = ours()
    assert np.array_equal(torch.as_tensor(counts).cpu().numpy(), numpy_counts(array, labels))
    assert not torch.as_tensor(invalid).any()

    opponents = [Contender("torch argmax", lambda: torch_counts(outputs, expected))]
    left_out = {}
    if device == "cpu":
        opponents.insert(0, Contender(NUMPY, lambda: numpy_counts(array, labels)))
    else:
        left_out[NUMPY] = "the answers are on the GPU"
    if quick:
        left_out["torch.compile"] = QUICK_REASON
    else:
        fused = compiled(torch_counts)
        opponents.append(Contender("torch.compile", lambda: fused(outputs, expected), may_fail=True))
    compare(
        Case(
            operator="match_counts",
            what=f"match_counts, C={size.classes}, K={size.label_sets}",
            size=f"{size.suspects} × {size.triggers} × {size.classes}",
            bytes_moved=outputs.numel() * 4,
            ours=ours,
            floor=Contender("read", lambda: outputs.sum()),
            peers=opponents,
            left_out=left_out,
            aims=AIMS.get(size, []),
            headline=size in (SIZES[0], SIZES[2]),
            operations=outputs.numel() + size.suspects * size.triggers * size.label_sets,  # comparisons
            axis=("suspects", size.suspects),
        )
    )
