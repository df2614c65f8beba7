"""`embedding_loss`, forward and backward over many layers at once: unit filters → sketch → hinge, 256 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import harness
from benchmarks.harness import Case, Contender, captured, compiled, quantity
from benchmarks.projections import stored_signs
from wmengine import ops
from wmengine.ops import reference

BITS = 256
MARGIN = 1.0

# [out, in, kh, kw] of every convolution of ResNet-18, in execution order.
RESNET18: list[tuple[int, ...]] = [(64, 3, 7, 7), *[(64, 64, 3, 3)] * 4]
for out in (128, 256, 512):
    RESNET18 += [(out, out // 2, 3, 3), (out, out, 3, 3), (out, out // 2, 1, 1), (out, out, 3, 3), (out, out, 3, 3)]
# And of ResNet-50, and every matrix of a decoder's sixteen layers, as large as Llama 3.2's of 1B.
RESNET50: list[tuple[int, ...]] = [(64, 3, 7, 7)]
for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
    for block in range(blocks):
        into = 4 * width if block else max(64, 2 * width)
        RESNET50 += [(width, into, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
        RESNET50 += [(4 * width, into, 1, 1)] * (block == 0)
DECODER = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)] * 16
SMALL: list[tuple[int, ...]] = [(32, 1, 3, 3), (64, 32, 3, 3), (128, 64, 3, 3), (128, 512), (10, 128)]


class Size(NamedTuple):
    """A network of NETWORKS, and what its weights are stored as."""

    network: str
    dtype: str = "float32"


NETWORKS = {
    "small CNN": SMALL,
    "ResNet-18": RESNET18,
    "ResNet-50": RESNET50,
    "decoder of 1B": DECODER,
    "two layers": [(8, 4, 3, 3), (10, 32)],
}
SIZES = [Size("small CNN"), Size("ResNet-18")]
GPU_SIZES = [Size("ResNet-50"), Size("decoder of 1B"), Size("decoder of 1B", "bfloat16")]
DRAWN = 100_000_000  # weights up to which peers get the very signs and buckets of ours; drawing them takes a CPU long
QUICK_SIZES = [Size("two layers")]
EAGER = "same formula, stored signs and buckets, eager torch"
COMPILED = "same formula, stored signs and buckets, torch.compile"
DENSE = "stored matrix, eager torch"


def signs_and_buckets(key: int, weight: Tensor, drawn: bool) -> tuple[Tensor, Tensor]:
    """Of a layer's weights, float32 and int64: as the key draws them, or any, which cost a peer the same."""
    count, device = weight.numel(), weight.device
    if drawn:
        signs = torch.from_numpy(reference.signs(key, count, domain=reference.DOMAIN_SKETCH)).float()
        return signs.to(device), torch.from_numpy(reference.buckets(key, count, BITS)).to(device)
    return torch.randn(count, device=device).sign(), torch.randint(0, BITS, (count,), device=device)


@pytest.mark.parametrize("graph", [False, True], ids=["", "in a graph"])
def test_embedding_loss(size: Size, graph: bool, compare: Callable[[Case], None], device: str) -> None:
    if graph and device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    torch.manual_seed(1)
    shapes, dtype = NETWORKS[size.network], getattr(torch, size.dtype)
    weights = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
    bits = torch.randint(0, 2, (BITS,), dtype=torch.uint8, device=device)
    side = 2.0 * bits.float() - 1.0
    keys = [1000003 * (index + 1) for index in range(len(weights))]
    scale = math.sqrt(BITS / sum(shape[0] for shape in shapes))
    total = sum(weight.numel() for weight in weights)
    kind = ", in a CUDA graph" * graph + f", {size.dtype}" * (size.dtype != "float32")
    as_is: Callable[[harness.Run], harness.Run] = captured if graph else lambda run: run

    differentiate: Callable[[Tensor], Tensor] = partial(harness.differentiate, weights)

    def ours() -> Tensor:
        what = {"carrier": "unit_filters", "projection": "sketch", "link": "hinge", "margin": MARGIN, "scale": scale}
        return differentiate(ops.embedding_loss(weights, keys, bits, **what)[0])

    case = Case(
        operator="embedding_loss",
        what=f"embedding_loss, forward + backward by autograd{kind}",
        size=f"{size.network}: {quantity(total)} weights in {len(weights)} layers, T={BITS}",
        bytes_moved=2 * dtype.itemsize * total,
        ours=as_is(ours),
        floor=Contender("copy into fresh memory", as_is(lambda: [weight.detach().clone() for weight in weights])),
        headline=size.network == "ResNet-18",
        gpu_bound=2.0,
        operations=8 * total,  # a square, a scaling and a signed addition; a dot product, a scaling, a projection
        axis=("weights", total),
    )
    if graph:
        compare(case)
        return
    chosen = [signs_and_buckets(key, weight, total <= DRAWN) for key, weight in zip(keys, weights, strict=True)]

    def unit_filters() -> list[Tensor]:
        return [functional.normalize(weight.flatten(1).float()).reshape(-1) for weight in weights]

    def stored_sketch() -> Tensor:
        y = torch.zeros(BITS, device=device)
        for values, (signs, buckets) in zip(unit_filters(), chosen, strict=True):
            y = y.index_add(0, buckets, signs * values)
        return functional.relu(MARGIN - side * scale * y).sum()

    if total <= DRAWN:
        torch.testing.assert_close(ours().detach(), stored_sketch().detach(), rtol=1e-4, atol=1e-4)
    held = 12 * total
    fused, left_out = compiled(stored_sketch), {}
    opponents = [
        Contender(EAGER, lambda: differentiate(stored_sketch()), holds=held),
        Contender(COMPILED, lambda: differentiate(fused()), holds=held, may_fail=True),
    ]
    try:
        matrix = stored_signs(BITS, total, device)
    except ValueError as reason:
        left_out[DENSE] = str(reason)
    else:

        def dense() -> Tensor:
            return functional.relu(MARGIN - side * scale * (matrix @ torch.cat(unit_filters()))).sum()

        opponents.append(Contender(DENSE, lambda: differentiate(dense()), holds=4 * matrix.numel()))
    compare(replace(case, peers=opponents, left_out=left_out))
