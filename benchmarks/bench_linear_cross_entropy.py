"""`marked_linear_cross_entropy`, forward and backward: the head's three products and the loss between them.

The floor is those three products alone, each in one piece and into memory that is kept: no implementation does less.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import harness
from benchmarks.harness import QUICK_REASON, Aim, Case, Contender, compiled
from wmengine import ops
from wmengine.ops import torch_linear_cross_entropy


class Size(NamedTuple):
    """hidden [rows, features], head [classes, features]; the last eighth of the rows are triggers."""

    rows: int
    features: int
    classes: int
    dtype: str = "float32"


CURVE = (512, 256)  # rows and features of the sizes that differ in their classes only
SIZES = [
    Size(256, 128, 1000),
    *(Size(*CURVE, classes) for classes in (100, 1000, 10_000, 100_000)),
    Size(2048, 256, 32_000),
    Size(512, 512, 50_257),
    Size(256, 256, 262_144),
    Size(2048, 256, 32_000, "bfloat16"),
]
QUICK_SIZES = [Size(16, 8, 10), Size(32, 16, 100, "bfloat16")]
PLAIN = "F.cross_entropy of F.linear"
TORCHS = "F.linear_cross_entropy"
LEAST_ROWS_OF_TORCH = 8  # of its own chunks; with fewer a call takes tens of seconds
PRODUCTS = "its three products"
AIMS = {SIZES[5]: [Aim(PRODUCTS, 1.25), Aim(PLAIN, 1.1)], SIZES[7]: [Aim(PRODUCTS, 1.25), Aim(PLAIN, 1.1)]}


def test_marked_linear_cross_entropy(size: Size, compare: Callable[[Case], None], device: str, quick: bool) -> None:
    torch.manual_seed(1)
    dtype = getattr(torch, size.dtype)
    if dtype == torch.bfloat16 and device == "cpu" and not torch_linear_cross_entropy._BFLOAT16_ON_CPU:
        pytest.skip("this processor has no instructions for bfloat16: a peer would take minutes a call")
    rows, features, classes = size[:3]
    hidden = torch.randn(rows, features, device=device, dtype=dtype, requires_grad=True)
    head = torch.randn(classes, features, device=device).div_(features**0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, classes, (rows,), device=device)
    group = (torch.arange(rows, device=device) >= rows - rows // 8).long()
    h, w = hidden.detach(), head.detach()
    logits = torch.empty(rows, classes, device=device, dtype=dtype)
    by_hidden, by_head = torch.empty_like(h), torch.empty_like(w)

    differentiate: Callable[[Tensor], Tensor] = partial(harness.differentiate, [hidden, head])

    def ours() -> Tensor:
        return differentiate(ops.marked_linear_cross_entropy(hidden, head, labels, None, group, groups=2).loss)

    def products() -> None:
        torch.mm(h, w.t(), out=logits)
        torch.mm(logits, w, out=by_hidden)
        torch.mm(logits.t(), h, out=by_head)

    def plain(hidden: Tensor, head: Tensor) -> Tensor:
        return functional.cross_entropy(functional.linear(hidden, head), labels)

    def torchs(**options: int) -> Tensor:
        chosen = torch.nn.LinearCrossEntropyOptions(**options)
        return differentiate(functional.linear_cross_entropy(hidden, head, labels, options=chosen))

    expected = differentiate(plain(hidden, head)).detach().float()
    expected_gradients = hidden.grad, head.grad
    rtol, atol = (1e-4, 1e-6) if dtype == torch.float32 else (0.02, 1e-3)
    torch.testing.assert_close(ours().detach(), expected, rtol=rtol, atol=atol)
    torch.testing.assert_close((hidden.grad, head.grad), expected_gradients, rtol=rtol, atol=atol)
    del expected_gradients

    chunk = torch_linear_cross_entropy.rows_of_a_chunk(rows, features, classes, torch.device(device).type)
    opponents = [
        Contender(PLAIN, lambda: differentiate(plain(hidden, head))),
        Contender(f"{TORCHS}, our chunks", lambda: torchs(batch_chunk_size=chunk)),
    ]
    left_out = {}
    if rows * features // classes >= LEAST_ROWS_OF_TORCH:
        opponents.append(Contender(TORCHS, torchs))
    else:
        left_out[TORCHS] = "its own chunks have under 8 rows here: tens of seconds a call"
    if quick:
        left_out["torch.compile"] = QUICK_REASON
    else:
        fused = compiled(plain)
        opponents.append(
            Contender(f"{PLAIN}, torch.compile", lambda: differentiate(fused(hidden, head)), may_fail=True)
        )
    if device == "cpu":
        left_out["Liger-Kernel"] = "needs a GPU"
    else:
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        except ImportError:
            left_out["Liger-Kernel"] = "not installed: pip install liger-kernel"
        else:
            liger = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
            opponents.append(
                Contender("Liger-Kernel", lambda: differentiate(liger(head, hidden, labels)), may_fail=True)
            )
    compare(
        Case(
            operator="linear_cross_entropy",
            what="marked_linear_cross_entropy, forward + backward by autograd",
            size=" × ".join(map(str, size[:3])) + ("" if dtype == torch.float32 else f", {size.dtype}"),
            bytes_moved=2 * (hidden.numel() + head.numel()) * dtype.itemsize,
            operations=6 * rows * features * classes,
            axis=("classes", classes) if size[:2] == CURVE else None,
            ours=ours,
            floor=Contender(PRODUCTS, products),
            peers=opponents,
            left_out=left_out,
            aims=AIMS.get(size, []),
            headline=size in (SIZES[5], SIZES[7]),
        )
    )
