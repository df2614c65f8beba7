"""`marked_cross_entropy`, forward and backward: task and trigger rows, gradient, hits in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import QUICK_REASON, Aim, Case, Contender, compiled
from wmengine import _cpu, ops


class Size(NamedTuple):
    """Logits [rows, classes]; the last eighth of the rows are triggers."""

    rows: int
    classes: int


SIZES = [Size(144, 10), Size(1024, 1000), Size(1024, 32000)]
QUICK_SIZES = [Size(16, 10), Size(32, 100)]
ONCE = "F.cross_entropy once"
TWICE = "F.cross_entropy twice + argmax accuracy"
AIMS = {SIZES[1]: [Aim(ONCE, 3.0), Aim(TWICE, 4.0)], SIZES[2]: [Aim(ONCE, 2.5), Aim(TWICE, 4.0)]}


def test_marked_cross_entropy(size: Size, compare: Callable[[Case], None], device: str, quick: bool) -> None:
    torch.manual_seed(1)
    logits = torch.randn(size.rows, size.classes, device=device, requires_grad=True)
    labels = torch.randint(0, size.classes, (size.rows,), device=device)
    task = size.rows - size.rows // 8
    group = (torch.arange(size.rows, device=device) >= task).long()

    def differentiate(loss: Tensor) -> Tensor:
        logits.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def ours() -> Tensor:
        return differentiate(ops.marked_cross_entropy(logits, labels, None, group, groups=2).loss)

    def twice(logits: Tensor) -> tuple[Tensor, Tensor]:
        loss = functional.cross_entropy(logits[:task], labels[:task]) * (task / size.rows)
        loss = loss + functional.cross_entropy(logits[task:], labels[task:]) * (1 - task / size.rows)
        return loss, (logits[task:].argmax(dim=1) == labels[task:]).sum()

    expected_loss, expected_hits = twice(logits)
    torch.testing.assert_close(ours().detach(), expected_loss.detach())
    hits = ops.marked_cross_entropy(logits, labels, None, group, groups=2).group_hits
    assert int(hits[1]) == int(expected_hits)
    opponents = [
        Contender(ONCE, lambda: differentiate(functional.cross_entropy(logits, labels))),
        Contender(TWICE, lambda: differentiate(twice(logits)[0])),
    ]
    left_out = {"Liger-Kernel": "needs a GPU"} if device == "cpu" else {}
    if quick:
        left_out["torch.compile"] = QUICK_REASON
    else:
        once_fused, twice_fused = compiled(functional.cross_entropy), compiled(twice)
        opponents += [
            Contender(f"{ONCE}, torch.compile", lambda: differentiate(once_fused(logits, labels)), may_fail=True),
            Contender(f"{TWICE}, torch.compile", lambda: differentiate(twice_fused(logits)[0]), may_fail=True),
        ]
    compare(
        Case(
            operator="cross_entropy",
            what="marked_cross_entropy, forward + backward by autograd",
            size=f"{size.rows} × {size.classes}",
            bytes_moved=2 * logits.numel() * 4,
            ours=ours,
            floor=Contender("copy into fresh memory", lambda: logits.detach().clone()),
            peers=opponents,
            left_out=left_out,
            aims=AIMS.get(size, []),
            headline=size.classes >= 1000,
        )
    )


def test_bare_operator(size: Size, compare: Callable[[Case], None], device: str) -> None:
    """The same pass without autograd, its gradient written into memory that is kept: what page faults do not hide."""
    if device != "cpu":
        pytest.skip("a GPU's caching allocator hands out no fresh memory in a steady state")
    torch.manual_seed(1)
    logits, gradient = torch.randn(size.rows, size.classes), torch.empty(size.rows, size.classes)
    labels, group = torch.randint(0, size.classes, (size.rows,)), torch.zeros(size.rows, dtype=torch.int64)
    group_loss, group_hits = torch.empty(1), torch.empty(1, dtype=torch.int64)
    leaf = logits.clone().requires_grad_()

    def ours() -> float:
        pointers = [tensor.data_ptr() for tensor in (group_loss, group_hits, gradient)]
        return float(
            _cpu.marked_cross_entropy(
                logits.data_ptr(),
                size.rows,
                size.classes,
                size.classes,
                labels.data_ptr(),
                0,
                group.data_ptr(),
                1,
                0.0,
                -100,
                True,
                *pointers,
            )
        )

    def eager() -> None:
        leaf.grad = None
        functional.cross_entropy(leaf, labels).backward()  # type: ignore[no-untyped-call]

    eager()
    ours()
    torch.testing.assert_close(gradient, leaf.grad)
    compare(
        Case(
            operator="cross_entropy",
            what="marked_cross_entropy, bare operator into kept memory",
            size=f"{size.rows} × {size.classes}",
            bytes_moved=2 * logits.numel() * 4,
            ours=ours,
            floor=Contender("copy", lambda: gradient.copy_(logits)),
            peers=[Contender(ONCE, eager)],
        )
    )
