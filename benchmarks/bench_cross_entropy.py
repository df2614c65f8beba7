"""`marked_cross_entropy`, forward and backward: task and trigger rows, gradient, hits in one pass."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import harness
from benchmarks.harness import COPYING, Aim, Case, Contender, compiled
from wmengine import _cpu, ops


class Size(NamedTuple):
    """Logits [rows, classes]; the last eighth of the rows are triggers."""

    rows: int
    classes: int
    dtype: str = "float32"


SIZES = [
    Size(144, 10),
    Size(1024, 100),
    Size(1024, 1000),
    Size(16384, 1000),
    Size(1024, 32000),
    Size(128, 262144),
    Size(1024, 32000, "bfloat16"),
]
GPU_SIZES = [
    Size(32768, 1000, "bfloat16"),
    Size(8192, 32000, "bfloat16"),
    Size(4096, 128256, "bfloat16"),
    Size(2048, 262144, "bfloat16"),
]
QUICK_SIZES = [Size(16, 10), Size(32, 100), Size(32, 100, "bfloat16")]
ONCE = "F.cross_entropy once"
TWICE = "F.cross_entropy twice + argmax accuracy"
FLOOR = "copy into fresh memory"
FROM_MEMORY = [Aim(FLOOR, 2.0)]  # where the logits do not fit in any cache
AIMS = {
    SIZES[2]: [Aim(ONCE, 3.0), Aim(TWICE, 4.0)],
    SIZES[3]: FROM_MEMORY,
    SIZES[4]: [*FROM_MEMORY, Aim(ONCE, 2.5), Aim(TWICE, 4.0)],
    SIZES[5]: FROM_MEMORY,
    SIZES[6]: FROM_MEMORY,
}
# Of one logit: the comparison for the maximum; of its exponential the difference, bound, rounding (3), remainder (2),
# polynomial (10) and power of two; the sum; scale and offset of the gradient.
OPERATIONS = 1 + (1 + 1 + 3 + 2 + 10 + 1) + 1 + 2


def _case(size: Size, what: str, ours: Callable[[], object], floor: Contender, **others: Any) -> Case:
    logits = size.rows * size.classes
    return Case(
        operator="cross_entropy",
        what=f"marked_cross_entropy, {what}" + (f", {size.dtype}" if size.dtype != "float32" else ""),
        size=f"{size.rows} × {size.classes}",
        bytes_moved=2 * logits * getattr(torch, size.dtype).itemsize,
        operations=OPERATIONS * logits,
        axis=("logits", logits),
        ours=ours,
        floor=floor,
        **others,
    )


def _gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """What torch computes in float32, rounded to the type of the logits."""
    leaf = logits.detach().float().requires_grad_()
    loss = functional.cross_entropy(leaf, labels)
    return torch.autograd.grad(loss, leaf)[0].to(logits.dtype)


def _eager(logits: Tensor, labels: Tensor) -> Contender:
    leaf = logits.detach().requires_grad_()
    loss_of = functional.cross_entropy
    return Contender(ONCE, lambda: harness.differentiate([leaf], loss_of(leaf, labels)))


def _liger(logits: Tensor, labels: Tensor) -> Contender:
    """Liger overwrites the logits that it is given, so it gets its own."""
    loss_of = importlib.import_module("liger_kernel.transformers").LigerCrossEntropyLoss()
    leaf = logits.detach().clone().requires_grad_()

    def run() -> None:
        leaf.grad = None
        loss_of(leaf, labels).backward()

    return Contender("Liger-Kernel", run, may_fail=True)


def test_marked_cross_entropy(size: Size, compare: Callable[[Case], None], device: str) -> None:
    torch.manual_seed(1)
    dtype = getattr(torch, size.dtype)
    logits = torch.randn(size.rows, size.classes, device=device).to(dtype).requires_grad_()
    labels = torch.randint(0, size.classes, (size.rows,), device=device)
    task = size.rows - size.rows // 8
    group = (torch.arange(size.rows, device=device) >= task).long()

    differentiate: Callable[[Tensor], Tensor] = partial(harness.differentiate, [logits])

    def ours() -> Tensor:
        return differentiate(ops.marked_cross_entropy(logits, labels, None, group, groups=2).loss)

    def twice(logits: Tensor) -> tuple[Tensor, Tensor]:
        loss = functional.cross_entropy(logits[:task], labels[:task]) * (task / size.rows)
        loss = loss + functional.cross_entropy(logits[task:], labels[task:]) * (1 - task / size.rows)
        return loss, (logits[task:].argmax(dim=1) == labels[task:]).sum()

    expected_loss, expected_hits = twice(logits.detach().float())
    torch.testing.assert_close(ours().detach(), expected_loss)
    hits = ops.marked_cross_entropy(logits, labels, None, group, groups=2).group_hits
    assert int(hits[1]) == int(expected_hits)
    once_fused, twice_fused = compiled(functional.cross_entropy), compiled(twice)
    opponents = [
        Contender(ONCE, lambda: differentiate(functional.cross_entropy(logits, labels))),
        Contender(TWICE, lambda: differentiate(twice(logits)[0])),
        Contender(f"{ONCE}, torch.compile", lambda: differentiate(once_fused(logits, labels)), may_fail=True),
        Contender(f"{TWICE}, torch.compile", lambda: differentiate(twice_fused(logits)[0]), may_fail=True),
    ]
    left_out = {}
    if device == "cpu":
        left_out["Liger-Kernel"] = "needs a GPU"
    else:
        try:
            opponents.append(_liger(logits, labels))
        except ImportError as error:
            left_out["Liger-Kernel"] = f"not installed: {error}"
    compare(
        _case(
            size,
            "forward + backward by autograd",
            ours,
            Contender(FLOOR, lambda: logits.detach().clone()),
            peers=opponents,
            left_out=left_out,
            aims=AIMS.get(size, []),
            headline=size.classes >= 1000,
            gpu_bound=COPYING,
        )
    )


def test_bare_operator(size: Size, compare: Callable[[Case], None], device: str) -> None:
    """The same pass without autograd, its gradient written into memory that is kept: what page faults do not hide."""
    if device != "cpu":
        pytest.skip("a GPU's caching allocator hands out no fresh memory in a steady state")
    torch.manual_seed(1)
    logits = torch.randn(size.rows, size.classes).to(getattr(torch, size.dtype))
    gradient = torch.empty_like(logits)
    labels, group = torch.randint(0, size.classes, (size.rows,)), torch.zeros(size.rows, dtype=torch.int64)
    loss, denominator, group_loss = torch.empty(()), torch.empty(()), torch.empty(1)
    group_hits = torch.empty(1, dtype=torch.int64)
    stored = {"float32": 0, "bfloat16": 2}[size.dtype]

    def ours() -> None:
        _cpu.marked_cross_entropy(
            logits.data_ptr(), stored, size.rows, size.classes, size.classes, labels.data_ptr(), 0, group.data_ptr(), 1,
            0.0, -100, True, loss.data_ptr(), group_loss.data_ptr(), group_hits.data_ptr(), 0, denominator.data_ptr(),
            gradient.data_ptr(),
        )  # fmt: skip

    ours()
    torch.testing.assert_close(gradient, _gradient(logits, labels))
    floor = Contender("copy", lambda: gradient.copy_(logits))
    compare(_case(size, "bare operator into kept memory", ours, floor, peers=[_eager(logits, labels)]))
