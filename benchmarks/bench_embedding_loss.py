"""`embedding_loss`, forward and backward over many layers at once: unit filters → sketch → hinge, 256 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import harness
from benchmarks.harness import Case, Contender, compiled, quantity
from benchmarks.projections import stored_signs
from wmengine import ops
from wmengine.ops import reference

BITS = 256
MARGIN = 1.0

# [out, in, kh, kw] of every convolution of ResNet-18, in execution order.
RESNET18: list[tuple[int, ...]] = [(64, 3, 7, 7), *[(64, 64, 3, 3)] * 4]
for out in (128, 256, 512):
    RESNET18 += [(out, out // 2, 3, 3), (out, out, 3, 3), (out, out // 2, 1, 1), (out, out, 3, 3), (out, out, 3, 3)]
SMALL: list[tuple[int, ...]] = [(32, 1, 3, 3), (64, 32, 3, 3), (128, 64, 3, 3), (128, 512), (10, 128)]


class Size(NamedTuple):
    """A network of NETWORKS."""

    network: str


NETWORKS = {"small CNN": SMALL, "ResNet-18": RESNET18, "two layers": [(8, 4, 3, 3), (10, 32)]}
SIZES = [Size("small CNN"), Size("ResNet-18")]
QUICK_SIZES = [Size("two layers")]
EAGER = "same formula, stored signs and buckets, eager torch"
COMPILED = "same formula, stored signs and buckets, torch.compile"
DENSE = "stored matrix, eager torch"


def test_embedding_loss(size: Size, compare: Callable[[Case], None], device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = NETWORKS[size.network]
    weights = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    bits = torch.randint(0, 2, (BITS,), generator=generator, dtype=torch.uint8).to(device)
    side = 2.0 * bits.float() - 1.0
    keys = [1000003 * (index + 1) for index in range(len(weights))]
    scale = math.sqrt(BITS / sum(shape[0] for shape in shapes))
    total = sum(weight.numel() for weight in weights)
    chosen = [
        (
            torch.from_numpy(reference.signs(key, weight.numel(), domain=reference.DOMAIN_SKETCH)).float().to(device),
            torch.from_numpy(reference.buckets(key, weight.numel(), BITS)).to(device),
        )
        for key, weight in zip(keys, weights, strict=True)
    ]

    differentiate: Callable[[Tensor], Tensor] = partial(harness.differentiate, weights)

    def ours() -> Tensor:
        what = {"carrier": "unit_filters", "projection": "sketch", "link": "hinge", "margin": MARGIN, "scale": scale}
        return differentiate(ops.embedding_loss(weights, keys, bits, **what)[0])

    def unit_filters() -> list[Tensor]:
        return [functional.normalize(weight.flatten(1)).reshape(-1) for weight in weights]

    def stored_sketch() -> Tensor:
        y = torch.zeros(BITS, device=device)
        for values, (signs, buckets) in zip(unit_filters(), chosen, strict=True):
            y = y.index_add(0, buckets, signs * values)
        return functional.relu(MARGIN - side * scale * y).sum()

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
    compare(
        Case(
            operator="embedding_loss",
            what="embedding_loss, forward + backward by autograd",
            size=f"{size.network}: {quantity(total)} weights in {len(weights)} layers, T={BITS}",
            bytes_moved=2 * 4 * total,
            ours=ours,
            floor=Contender("copy into fresh memory", lambda: [weight.detach().clone() for weight in weights]),
            peers=opponents,
            left_out=left_out,
            headline=size.network == "ResNet-18",
            operations=8 * total,  # a square, a scaling and a signed addition; a dot product, a scaling, a projection
            axis=("weights", total),
        )
    )
