"""`python -m benchmarks.every_operator`: every GPU operator once, small, on fresh data; what compute-sanitizer watches.

Inputs are made on the CPU, so that nearly every kernel it sees is ours. Exit status 1 without a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from wmengine import ops
from wmengine.ops import cuda, reference

DEVICE = "cuda"
STORED = (torch.float32, torch.float32, torch.bfloat16)


def random(*shape: int) -> Tensor:
    return torch.randn(shape).to(DEVICE)


def labels(*shape: int, classes: int = 10) -> Tensor:
    return torch.randint(-1, classes, shape).to(DEVICE)


def projections() -> Iterator[object]:
    """Runs of weights shorter than a block of signs, as long, and longer; every kind of dense rows."""
    for total in (32, 256, 4096, 8192):
        yield ops.sketch(random(9001), 3, total)
        yield ops.sketch_adjoint(random(total), 3, 9001)
    for kind in reference.PROJECTIONS[1:]:
        yield ops.project(random(9001), 3, 40, kind)
        yield ops.project_adjoint(random(40), 3, 9001, kind)


def counts() -> Iterator[object]:
    """Each way in which rows are shared out, each width of load."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for classes in (10, 1001, 20_001):
            yield cuda.match_counts(random(45, classes).to(dtype), labels(45), None, 1, True)
            yield cuda.match_counts(random(45, classes).softmax(dim=1).to(dtype), labels(45), labels(45) % 3, 3, False)
    for suspects, rows, sets in ((3, 50, 2), (2, 5000, 3), (65, 1100, 9)):
        for integer in (torch.int32, torch.int64):
            yield cuda.label_matches(labels(suspects, rows).to(integer), labels(sets, rows))
    for total in (100, 160, 256):
        messages, registry = (
            torch.randint(0, 256, (rows, -(-total // 8)), dtype=torch.uint8).to(DEVICE) for rows in (9, 9000)
        )
        yield cuda.bit_matches(messages, registry, total)
        for best in (5, 300):
            yield cuda.best_bit_matches(messages, registry, total, best)


def losses() -> Iterator[object]:
    """Forward and backward of what networks are trained with."""
    bits = torch.ones(256, dtype=torch.uint8).to(DEVICE)
    for carrier in reference.CARRIERS:
        for projection in reference.PROJECTIONS:
            shapes = (33, 41), (6, 512), (64, 3, 3, 3)
            weights = [random(*shape).to(dtype).requires_grad_() for shape, dtype in zip(shapes, STORED, strict=True)]
            loss, _ = ops.embedding_loss(
                weights, [3, 5, 2**64 - 1], bits, carrier=carrier, projection=projection, link="bce"
            )
            yield torch.autograd.grad(loss, weights)
    for rows, classes in ((65, 10), (9, 5000), (5, 20_001), (5, 32_768)):
        known = labels(rows).clamp(min=0)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            logits, weight = random(rows, classes).to(dtype).requires_grad_(), random(rows).abs()
            marked = ops.marked_cross_entropy(logits, known, weight, known % 3, groups=3, label_smoothing=0.1)
            yield torch.autograd.grad(2.0 * marked.loss, logits)
        features = random(rows, 70).requires_grad_()
        yield torch.autograd.grad(ops.soft_nearest_neighbor(features, known % 3, 70.0), features)


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU: torch sees none")
        return 1
    calls = sum(1 for family in (projections, counts, losses) for _ in family())
    torch.cuda.synchronize()
    print(f"{calls} calls on {torch.cuda.get_device_name()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
