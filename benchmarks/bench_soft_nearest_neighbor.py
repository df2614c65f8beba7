"""`soft_nearest_neighbor`, forward and backward by features and temperature, beside the formulas with N × N arrays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Aim, Case, Contender, compiled
from wmengine import ops

CURVE = 256  # features of the sizes that form a curve over rows


class Size(NamedTuple):
    """Features [rows, features] of ten classes or, where that leaves single rows, fewer."""

    rows: int
    features: int


SIZES = [
    *(Size(64, 10), Size(64, CURVE), Size(128, CURVE), Size(512, CURVE), Size(1024, CURVE)),
    *(Size(128, 4096), Size(512, 4096), Size(1024, 512)),
]
QUICK_SIZES = [Size(16, 10), Size(200, 40)]
PUBLISHED = "published formula, eager"
LOG_SUM_EXP = "log-sum-exp formula, eager"
AIMS = {Size(512, CURVE): [Aim(PUBLISHED, 1.0), Aim(LOG_SUM_EXP, 1.0)]}


def squared_distances(x: Tensor) -> Tensor:
    norms = x.square().sum(dim=1)
    return norms[:, None] + norms[None] - 2.0 * (x @ x.t())


def published(x: Tensor, labels: Tensor, temperature: Tensor) -> Tensor:
    """As cleverhans and EWE write it, but for their ε beside the sums: exponentials unshifted, the identity taken away.

    The fewest passes over N × N numbers; it underflows at temperatures well below the distances.
    """
    exponentials = torch.exp(-squared_distances(x) / temperature) - torch.eye(len(x), device=x.device)
    same = (labels[:, None] == labels[None]).to(x.dtype)
    return -torch.log((exponentials * same).sum(dim=1) / exponentials.sum(dim=1)).mean()


def log_sum_exp(x: Tensor, labels: Tensor, temperature: Tensor) -> Tensor:
    """What our operator computes, at any temperature."""
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    scores = (-squared_distances(x) / temperature).masked_fill(itself, -torch.inf)
    other = labels[:, None] != labels[None]
    return (torch.logsumexp(scores, 1) - torch.logsumexp(scores.masked_fill(other, -torch.inf), 1)).mean()


def test_soft_nearest_neighbor(size: Size, compare: Callable[[Case], None], device: str) -> None:
    torch.manual_seed(1)
    rows, features = size
    x = torch.randn(rows, features, device=device, requires_grad=True)
    labels = torch.arange(rows, device=device) % min(10, rows // 2)  # the published formula fails on single rows
    temperature = torch.tensor(float(features), device=device, requires_grad=True)

    differentiate: Callable[[Tensor], Tensor] = partial(harness.differentiate, [x, temperature])

    def ours() -> Tensor:
        return differentiate(ops.soft_nearest_neighbor(x, labels, temperature))

    def peer(formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: differentiate(formula(x, labels, temperature))

    for formula in (published, log_sum_exp):
        torch.testing.assert_close(ours().detach(), formula(x, labels, temperature).detach(), rtol=1e-4, atol=1e-5)
        by_ours = ours() is not None and x.grad
        peer(formula)()
        torch.testing.assert_close(by_ours, x.grad, rtol=1e-2, atol=1e-2 * float(x.grad.abs().max()))

    half = max(1, rows // 2)
    features_only, weights = x.detach(), torch.randn(rows, rows, device=device)
    products, sums = torch.empty(half, rows, device=device), torch.empty(rows, features, device=device)

    def bare_products() -> None:
        torch.mm(features_only[:half], features_only.t(), out=products)  # distances above the diagonal
        torch.mm(weights, features_only, out=sums)

    opponents = [
        Contender(PUBLISHED, peer(published)),
        Contender(LOG_SUM_EXP, peer(log_sum_exp)),
        Contender("published formula, torch.compile", peer(compiled(published)), may_fail=True),
        Contender("log-sum-exp formula, torch.compile", peer(compiled(log_sum_exp)), may_fail=True),
    ]
    compare(
        Case(
            operator="soft_nearest_neighbor",
            what="soft_nearest_neighbor, forward + backward by features and temperature",
            size=f"{rows} × {features}",
            bytes_moved=2 * x.numel() * 4,
            ours=ours,
            floor=Contender("its matrix products alone, torch.mm", bare_products),
            peers=opponents,
            aims=AIMS.get(size, []),
            headline=size == Size(512, CURVE),
            operations=3 * rows * rows * features,
            axis=("rows", rows) if features == CURVE else None,
        )
    )
