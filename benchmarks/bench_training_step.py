"""A training step of the demo's network with both marks, against a plain step with as many extra rows, and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import wmengine
from benchmarks.harness import Aim, Case, Contender
from wmengine.demo import build_network

CLASSES = 10
SAME_ROWS = "plain step with as many extra rows"


class Size(NamedTuple):
    """Task rows of a batch; the embedder adds its trigger rows to them."""

    batch: int


SIZES = [Size(16), Size(64), Size(256)]
QUICK_SIZES = [Size(16)]


def test_training_step(size: Size, compare: Callable[[Case], None], device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(size.batch, 1, 8, 8, generator=generator).to(device)
    labels = torch.randint(0, CLASSES, (size.batch,), generator=generator).to(device)

    marked_model, marked_optimizer = network_and_optimizer(device)
    key = wmengine.Key("benchmark", bytes(32))
    embedder = wmengine.Embedder(
        marked_model, key, ["sketch", "adi"], num_classes=CLASSES, sample=inputs, name="benchmark"
    )

    def marked_step() -> None:
        x, y = embedder.mix(inputs, labels)
        loss = embedder.loss(marked_model(x), y)
        marked_optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        marked_optimizer.step()

    longer, raised = embedder.mix(inputs, labels)
    extra = len(longer) - size.batch
    compare(
        Case(
            operator="training_step",
            what="training step of the demo's network with both marks",
            size=f"{size.batch} rows + {extra} trigger rows",
            bytes_moved=0,
            ours=marked_step,
            floor=Contender(SAME_ROWS, plain_step(longer, raised % CLASSES, device)),
            peers=[Contender("plain step without extra rows", plain_step(inputs, labels, device))],
            aims=[Aim(SAME_ROWS, 1.10)] if size.batch >= 64 else [],
            headline=size.batch == 64,
            axis=("rows", size.batch),
        )
    )


def network_and_optimizer(device: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The demo's network as it is before training, and the demo's optimizer."""
    model = build_network(seed=1).to(device).train()
    return model, torch.optim.Adam(model.parameters(), lr=1e-3)


def plain_step(inputs: Tensor, labels: Tensor, device: str) -> Callable[[], None]:
    """The step of somebody who marks nothing."""
    model, optimizer = network_and_optimizer(device)

    def step() -> None:
        loss = functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step
